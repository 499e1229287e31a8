"""Measures the speed and memory of this project and, if installed, of diffusers and, on CPUs, of OpenVINO.

    python scripts/benchmark.py --quick                 # the main figures, in the default precision
    python scripts/benchmark.py                         # everything; or --only step decode
    python scripts/benchmark.py --few-steps             # the fast ways to an image, side by side
    python scripts/benchmark.py --device cuda --compiled --steps 50 --only step decode picture throughput memory

It prints tables of the figures and of their ratios; --json writes a file. All libraries use the same weights: those of
--checkpoint, or random ones of the real size, which are made once in --cache (8.5 GB, and 3.6 GB for OpenVINO). Each
library runs in a separate process. They take turns, so that a machine that slows down affects all. A product of
matrices is measured before, between and after the runs: if it varies by more than 20 %, there are no ratios.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.benchmarks.processes import Worker, run, workers
from scripts.benchmarks.results import ENOUGH_RUNS, FEW_STEPS, Results
from scripts.support.command_line import Parser, exit_status
from scripts.support.output_files import check_different_files, check_folder, write_json

MEASURES = {
    "import": "import, beyond torch, s",
    "tokenizer": "tokenizer, prompts a second",
    "tiny": "tiny model, cold process to picture, s",
    "load": "load, after all imports, s",  # also prints the time of the imports
    "convert": "load in bfloat16, after all imports, s",
    "first": "cold process to the first step, s",
    "step": "U-Net step, batch of 2 at 64x64, s",
    "decode": "VAE decode, 512x512, s",
    "encode": "VAE encode, 512x512, s",
    "picture": "512x512 picture, dpm++2m, s",
    "throughput": "512x512 pictures a second",
    "memory": "peak resident memory, GB",
}
QUICK = ["import", "tokenizer", "tiny", "load", "step", "decode", "memory"]
USUAL = [name for name in MEASURES if name != "throughput"]
SMALL = {"import", "tokenizer", "tiny"}
LARGE = {"step", "decode", "encode", "picture", "memory"}  # measured in turns, with all contestants loaded
OF_OPENVINO = {"step", "decode", "picture", "memory"}
IMPORTS, TO_THE_END = "imports beyond torch, s", "to the end of that step, s"
RUNS = {"load": 3, "picture": 1}  # "first" is measured with "load"; all others: ENOUGH_RUNS
QUICK_RUNS, SLOW = 2, 5  # seconds: with --quick, a run that takes longer is not repeated
BATCHES = (1, 2, 4, 8, 16)
TERAFLOPS = {"step": 1.607, "decode": 2.515, "encode": 1.117}  # 1e12 operations; a multiply-add counts as two
CONVERTERS = {"diffusers": "reference_networks.py", "openvino": "openvino_networks.py"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("benchmark.py", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"only {', '.join(QUICK)}; default precision, fewer runs")
    what = f"any of {', '.join(MEASURES)} (default: all but throughput, which is for GPUs)"
    add("--only", nargs="+", choices=MEASURES, metavar="WHAT", help=what)
    add("--few-steps", action="store_true", help="the fast ways to an image; alone, or with those of --only")
    add("--dtypes", nargs="+", choices=["fp32", "fp16", "bf16"], help="precisions (default: fp32 and the 16-bit one)")
    add("--alone", action="store_true", help="only this project, even if diffusers or OpenVINO is installed")
    add("--compiled", action="store_true", help="also both with torch.compile, whose first step takes minutes")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps of an image (20)")
    runs = f"repetitions ({ENOUGH_RUNS}; load and first 3, picture 1; with --quick {QUICK_RUNS}, or 1 if slow)"
    add("--runs", type=int, metavar="N", help=runs)
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first that is available)")
    add("--checkpoint", type=Path, metavar="FILE", help="Stable Diffusion 1.5 weights (default: random ones)")
    add("--cache", type=Path, default=ROOT / "runs/benchmark", metavar="DIR", help="for the weights (runs/benchmark)")
    add("--json", type=Path, metavar="FILE", help="write every single figure to this file")
    options = parser.parse_args(arguments)
    for name in ("runs", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} should be at least 1, not {getattr(options, name)}.")
    if options.checkpoint and not options.checkpoint.is_file():
        parser.error(f"--checkpoint should be a file, but {options.checkpoint} is not.")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json should be in an existing folder, but {options.json.parent} is not.")
    if options.json:
        try:
            check_folder("--json", options.json)
            check_different_files({"--checkpoint": options.checkpoint}, {"--json": options.json})
        except ValueError as error:
            parser.error(str(error))
    options.only = options.only or ([] if options.few_steps else QUICK if options.quick else USUAL)
    options.cache = options.cache.absolute()  # `run` works in another folder
    options.checkpoint = options.checkpoint and options.checkpoint.absolute()
    return options


def runs_of(measure: str, options: argparse.Namespace) -> int:
    """How often a measure is repeated."""
    usual = RUNS.get(measure, ENOUGH_RUNS)
    return options.runs or (min(usual, QUICK_RUNS) if options.quick else usual)


def alternate(
    options: argparse.Namespace, measure: str, contestants: dict[str, Callable[[], float]], results: Results
) -> None:
    """Repeats one measure, each time for every contestant. `contestants` are functions that return the figure."""
    results.probe(measure)
    for _ in range(runs_of(measure, options)):
        figures = {}
        for who, run_once in contestants.items():
            figures[who] = run_once()
            results.add(measure, who, figures[who])
        results.probe(measure)
        if options.quick and measure not in SMALL and max(figures.values()) > SLOW:
            break


def small_things(options: argparse.Namespace, results: Results) -> None:
    """Measures what does not need full-size weights."""
    functions = {"import": import_seconds, "tokenizer": prompts_a_second, "tiny": partial(demo_seconds, options.device)}
    for measure, function in functions.items():
        if measure in options.only:
            alternate(options, measure, {"sd": function}, results)


def import_seconds() -> float:
    code = "import torch, time; t = time.perf_counter(); import sd; print(time.perf_counter() - t)"
    return float(run(sys.executable, "-c", code))


def prompts_a_second() -> float:
    code = (
        "import time; from sd.tokenizer import Tokenizer; t = Tokenizer(); s = time.perf_counter();"
        "[t.encode(f'a photograph of {i} red houses on the hill, oil on canvas') for i in range(5000)];"
        "print(5000 / (time.perf_counter() - s))"
    )
    return float(run(sys.executable, "-c", code))


def demo_seconds(device: str, *flags: object) -> float:
    """Seconds from a cold process to a PNG: without other flags, of the tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run(sys.executable, "scripts/demo.py", "--seed", "0", "--out", folder, "--device", device, *flags)
        return time.perf_counter() - started


def cold_starts(options: argparse.Namespace, contestants: list[tuple], results: Results) -> None:
    """Measures imports, loading and the first step, each time in a new process.

    The weight files are in the system's file cache. Memory-mapped weights are read from it during the first step.
    """
    loading, first = "load" in options.only, "first" in options.only
    measures = [IMPORTS, "load"] * loading + ["first", TO_THE_END] * first
    results.probe(*measures)
    for _ in range(runs_of("load", options)):
        for contestant in contestants:
            with workers([contestant]) as (worker,):
                imports, seconds = worker.ask("imports")["seconds"], worker.load()
                if loading:
                    results.add(IMPORTS, worker.name, imports)
                    results.add("load", worker.name, seconds)
                if first:
                    worker.ask("read")
                    results.add("first", worker.name, time.perf_counter() - worker.started)
                    worker.ask("step")
                    results.add(TO_THE_END, worker.name, time.perf_counter() - worker.started)
        results.probe(*measures)


def convert(options: argparse.Namespace, checkpoint: Path, results: Results) -> None:
    """Measures loading in bfloat16, each time in a new process, beside a loop that only copies the weights."""

    def load(library: str) -> float:
        with workers([(library, "bf16", "cpu", checkpoint)]) as (worker,):
            worker.ask("imports")
            return worker.load()

    alternate(options, "convert", {f"{name} bf16": partial(load, name) for name in ("sd", "copies")}, results)


def large_things(options: argparse.Namespace, contestants: list[tuple], results: Results) -> None:
    """Measures the full-size networks; the contestants take turns."""
    with workers(contestants) as started:
        rates = {worker.name: worker.ask("gemm")["rate"] for worker in started}
        for worker in started:
            worker.load()
        for measure in ("step", "picture", "decode", "encode"):
            if measure in options.only or (measure == "step" and "memory" in options.only):
                taking_part = [one for one in started if one.library != "openvino" or measure in OF_OPENVINO]
                take_turns(options, measure, taking_part, results)
            if measure in options.only and measure in TERAFLOPS:
                for name, seconds in results.figures[measure].items():
                    reached = TERAFLOPS[measure] * 1e12 / median(seconds)
                    results.add(f"{measure}, share of the GEMM rate", name, reached / rates[name])
        for name, rate in rates.items():
            results.add("GEMM rate, TFLOP/s", name, rate / 1e12)


def take_turns(options: argparse.Namespace, measure: str, started: list[Worker], results: Results) -> None:
    """Repeats one measure, each time for every contestant, then adds the peak memory of each so far."""
    steps = [options.steps] if measure == "picture" else []
    answers = {}

    def ask(worker: Worker) -> float:
        answers[worker.name] = worker.ask(measure, *steps)
        return answers[worker.name]["seconds"]

    for worker in started:
        worker.ask("prepare", measure)
    alternate(options, measure, {worker.name: partial(ask, worker) for worker in started}, results)
    if "memory" in options.only and measure in ("step", "picture"):
        for name, answer in answers.items():
            for kind in sorted({"resident", "device"} & answer.keys(), reverse=True):
                results.add(f"peak {kind} memory after a {measure}, GB", name, answer[kind])


def throughput(options: argparse.Namespace, started: list[Worker], results: Results) -> None:
    """Measures images per second for each batch size that fits into memory."""
    for worker in started:
        for count in BATCHES:
            measure = f"{MEASURES['throughput']}, {count} at once"
            worker.ask("prepare", "picture", 1, count)
            results.probe(measure)
            seconds = worker.ask("picture", options.steps, count)["seconds"]
            results.probe(measure)
            if seconds == math.inf:
                break
            results.add(measure, worker.name, count / seconds)


def few_steps(options: argparse.Namespace, dtypes: list[str], checkpoint: Path, results: Results) -> None:
    """Measures the fast ways to an image, and the fastest of them from a cold process."""
    from scripts.benchmarks.few_steps import WAYS

    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "scripts/benchmarks/few_steps.py", checkpoint, folder)
        for dtype in dtypes:
            with workers([("few", dtype, options.device, checkpoint, False, folder)]) as (worker,):
                worker.load()
                for way in WAYS:
                    worker.ask("prepare", "way", way, 3)
                ways = {way: partial(seconds_of, worker, "way", way, options.steps) for way in WAYS}
                alternate(options, f"{FEW_STEPS}{dtype}, s", ways, results)
            from_cold(options, dtype, checkpoint, folder, results)


def seconds_of(worker: Worker, *command: object) -> float:
    return worker.ask(*command)["seconds"]


def from_cold(options: argparse.Namespace, dtype: str, checkpoint: Path, folder: str, results: Results) -> None:
    """Measures a demo with one step and a TAESD, beside a process that only imports torch and reads the whole file."""
    flags = ["--steps", 1, "--sampler", "euler", "--spacing", "trailing", "--cfg-scale", 1]
    flags += ["--width", 512, "--height", 512]
    code = "import sys, torch\nwith open(sys.argv[1], 'rb') as file:\n while file.read(1 << 24): pass"

    def reading() -> float:
        started = time.perf_counter()
        run(sys.executable, "-c", code, checkpoint)
        return time.perf_counter() - started

    drawing = partial(
        demo_seconds, options.device, "--checkpoint", checkpoint, "--vae", folder, "--dtype", dtype, *flags
    )
    measure = f"cold process to a PNG in 1 step with TAESD, {dtype}, s"
    alternate(options, measure, {"sd": drawing, "importing torch, reading the file": reading}, results)
    for whole, part in zip(*results.figures[measure].values()):
        results.add(f"{measure}: the difference", "sd", whole - part)


def take_part(options: argparse.Namespace, dtypes: list[str], fast: str, results: Results) -> list[tuple[str, str]]:
    """The library and the precision of each contestant. Adds a line to the results for what is not measured."""
    import torch

    def leave_out(what: str, why: str) -> None:
        results.not_measured.append(f"Not measured: {what}, because {why}.")

    on_cpu, only = options.device == "cpu", set(options.only)
    if on_cpu and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        leave_out("a GPU", "torch can use none here")
    if on_cpu and fast != "bf16" and "bf16" not in dtypes:
        leave_out("bfloat16", "this CPU does not multiply it natively, as far as its flags say")
    pairs = [("sd", dtype) for dtype in dtypes]
    if not options.alone and only & {"load", "first", "throughput", *LARGE}:
        if find_spec("diffusers") and find_spec("transformers"):
            pairs += [("diffusers", dtype) for dtype in dtypes]
        else:
            leave_out("diffusers", "it is not installed: `pip install -r requirements-dev.txt`")
    if not options.alone and on_cpu and only & OF_OPENVINO:
        if find_spec("openvino"):
            usable = [dtype for dtype in dtypes if dtype == "fp32" or dtype == fast]
            pairs += [("openvino", dtype) for dtype in usable]
            for dtype in dtypes:
                if dtype not in usable:
                    leave_out(f"OpenVINO in {dtype}", "this CPU does not multiply it natively")
        else:
            leave_out("OpenVINO", "it is not installed: `pip install -r requirements-benchmark.txt`")
    return sorted(pairs, key=lambda pair: dtypes.index(pair[1]))  # all libraries of a precision together


def make_weights(options: argparse.Namespace, libraries: list[str]) -> tuple[Path, dict[str, Path]]:
    """The checkpoint, and a folder with its weights in the format of each library. Makes them if they are missing."""
    checkpoint = options.checkpoint or options.cache / "sd15.safetensors"
    if not checkpoint.exists():
        run(sys.executable, "scripts/benchmarks/synthetic_checkpoint.py", checkpoint)
    stamp = f"{checkpoint.stem}-{checkpoint.stat().st_mtime_ns}"
    folders = {library: options.cache / f"{library}-{stamp}" for library in libraries}
    for library, folder in folders.items():
        if not folder.exists():
            run(sys.executable, f"scripts/benchmarks/{CONVERTERS[library]}", checkpoint, folder)
    weights = (
        file for folder in folders.values() for kind in ("*.safetensors", "*.bin") for file in folder.rglob(kind)
    )
    for file in (checkpoint, *weights):
        with open(file, "rb") as opened:  # read it into the system's file cache
            while opened.read(1 << 24):
                pass
    return checkpoint, folders


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status("benchmark.py", lambda: benchmark(options), "interrupted; nothing was written.")


def benchmark(options: argparse.Namespace) -> None:
    """Measures what the options select, prints the tables, and writes the JSON file."""
    from scripts.benchmarks.timing import steady_gemm
    from sd.runtime.devices import best_device, best_dtype

    device = best_device(options.device)
    results = Results(MEASURES, partial(steady_gemm, device, best_dtype(device)))
    options.device = str(device)
    fast = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}[str(best_dtype(device))]
    short = options.quick or options.few_steps
    dtypes = options.dtypes or ([fast] if short else sorted({"fp32", fast}, reverse=True))
    small_things(options, results)
    if {"load", "convert", "first", "throughput", *LARGE} & set(options.only) or options.few_steps:
        taking_part = take_part(options, dtypes, fast, results)
        checkpoint, folders = make_weights(options, [name for name in CONVERTERS if name in dict(taking_part)])
        contestants = [
            (library, dtype, options.device, checkpoint, False, folders.get(library)) for library, dtype in taking_part
        ]
        torch_only = [contestant for contestant in contestants if contestant[0] != "openvino"]
        if {"load", "first"} & set(options.only):
            cold_starts(options, torch_only, results)
        if "convert" in options.only:
            convert(options, checkpoint, results)
        if options.compiled:
            libraries = dict.fromkeys(contestant[0] for contestant in torch_only)
            compiled = [(name, fast, options.device, checkpoint, True, folders.get(name)) for name in libraries]
            contestants, torch_only = contestants + compiled, torch_only + compiled
        if LARGE & set(options.only):
            large_things(options, contestants, results)
        for contestant in torch_only if "throughput" in options.only else ():
            with workers([contestant]) as started:  # one at a time, because each keeps the memory of its peak
                started[0].load()
                throughput(options, started, results)
        if options.few_steps:
            few_steps(options, dtypes, checkpoint, results)
    machine = describe_machine(options.device)
    print(f"{machine}\n\n{results.report()}")
    if options.json:
        content = {"machine": machine, "figures": results.figures, "products": results.products}
        write_json(options.json, {**content, "not measured": results.not_measured})


def describe_machine(device: str) -> str:
    """The date, processor, GPU and version of torch, as one line."""
    import torch

    known = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.*)", known.read_text()) if known.exists() else []
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "openvino") if find_spec(name))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{time.strftime('%Y-%m-%d')}, {processor}, {cores} cores{gpu}, {libraries}"


if __name__ == "__main__":
    sys.exit(main())
