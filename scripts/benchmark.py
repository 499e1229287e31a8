"""Measures the speed and memory of this project and, if installed, of diffusers. Prints a table; --json writes a file.

    python scripts/benchmark.py --quick                 # the main figures, in the default precision
    python scripts/benchmark.py                         # everything; or --only step decode
    python scripts/benchmark.py --device cuda --compiled --steps 50 --only step decode picture throughput memory

Both libraries use the same weights: those of --checkpoint, or random ones of the real size, which are made once in
--cache (8.5 GB). Each library runs in a separate process. They take turns, so that a machine that slows down affects
both. A figure is the median of its runs. A ratio compares two medians from the same benchmark.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.support.command_line import Parser, exit_status
from scripts.support.output_files import check_different_files, check_folder, write_json

MEASURES = {
    "import": "import, beyond torch, s",
    "tokenizer": "tokenizer, prompts a second",
    "tiny": "tiny model, cold process to picture, s",
    "load": "load, after all imports, s",  # also prints the time of the imports
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
LARGE = {"step", "decode", "encode", "picture", "memory"}  # measured in turns, with all contestants loaded
SLOW = 5  # seconds: with --quick, a run that takes longer is not repeated
BATCHES = (1, 2, 4, 8, 16)
TERAFLOPS = {"step": 1.607, "decode": 2.515, "encode": 1.117}  # 1e12 operations; a multiply-add counts as two


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("benchmark.py", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"only {', '.join(QUICK)}; default precision, fewer runs")
    what = f"any of {', '.join(MEASURES)} (default: all but throughput, which is for GPUs)"
    add("--only", nargs="+", choices=MEASURES, metavar="WHAT", help=what)
    add("--dtypes", nargs="+", choices=["fp32", "fp16", "bf16"], help="precisions (default: fp32 and the 16-bit one)")
    add("--alone", action="store_true", help="only this project, even if diffusers is installed")
    add("--compiled", action="store_true", help="also both with torch.compile, whose first step takes minutes")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps of an image (20)")
    add("--runs", type=int, metavar="N", help="repetitions, except of images (5; with --quick 2, or 1 if slow)")
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
    options.runs = options.runs or (2 if options.quick else 5)
    options.only = options.only or (QUICK if options.quick else USUAL)
    return options


class Worker:
    """A process that runs one library. `ask` sends it a command and waits for the answer."""

    def __init__(self, library: str, dtype: str, device: str, path: Path, compiled: bool = False):
        how = ["compiled"] if compiled else []
        self.name = " ".join([library, dtype, *how])
        command = [sys.executable, ROOT / "scripts/benchmarks/worker.py", library, dtype, device, path, *how]
        self.started, pipe = time.perf_counter(), subprocess.PIPE
        # A new session, so that Ctrl-C reaches only this process, which then ends the workers.
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

    def ask(self, *command: object) -> dict[str, float]:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"{self.name} ended during {command[0]}: see above.")
        answer = json.loads(answer)
        if command[0] == "load" and answer["seconds"] == math.inf:
            raise ChildProcessError(f"{self.name} does not fit into memory with the others: choose fewer --dtypes.")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def workers(contestants: list[tuple]) -> Iterator[list[Worker]]:
    """Starts all workers at once. Idle workers cost only memory."""
    started = [Worker(*contestant) for contestant in contestants]
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


class Results:
    """All figures, by measure and contestant."""

    def __init__(self):
        self.figures: dict[str, dict[str, list[float]]] = {}

    def add(self, measure: str, contestant: str, figure: float) -> None:
        self.figures.setdefault(measure, {}).setdefault(contestant, []).append(figure)
        print(f"{measure:10} {contestant:24} {figure:10.3f}", file=sys.stderr)

    def table(self) -> str:
        """A Markdown table: each median with its ratio to diffusers in the same precision, and to diffusers in fp32."""
        lines = ["| what | who | median | / diffusers, same | / diffusers fp32 |", "|---|---|---:|---:|---:|"]
        for measure, row in self.figures.items():
            for who, figures in row.items():
                value = median(figures)
                same = row.get(who.replace("sd ", "diffusers ", 1)) if who.startswith("sd ") else None
                plain = row.get("diffusers fp32") if who != "diffusers fp32" else None
                ratios = " | ".join(f"{value / median(other):.2f}" if other else "" for other in (same, plain))
                lines.append(f"| {MEASURES.get(measure, measure)} | {who} | {value:.3g} | {ratios} |")
        return "\n".join(lines)


def small_things(options: argparse.Namespace, results: Results) -> None:
    """Measures what does not need full-size weights."""
    for _ in range(options.runs):
        if "import" in options.only:
            code = "import torch, time; t = time.perf_counter(); import sd; print(time.perf_counter() - t)"
            results.add("import", "sd", float(run(sys.executable, "-c", code)))
        if "tokenizer" in options.only:
            code = (
                "import time; from sd.tokenizer import Tokenizer; t = Tokenizer(); s = time.perf_counter();"
                "[t.encode(f'a photograph of {i} red houses on the hill, oil on canvas') for i in range(5000)];"
                "print(5000 / (time.perf_counter() - s))"
            )
            results.add("tokenizer", "sd", float(run(sys.executable, "-c", code)))
        if "tiny" in options.only:
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                run(sys.executable, "scripts/demo.py", "--seed", "0", "--out", folder, "--device", options.device)
                results.add("tiny", "sd", time.perf_counter() - started)


def run(*command: str | Path) -> str:
    """The output of a command. Raises ChildProcessError if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(map(str, command[:3]))} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def cold_starts(options: argparse.Namespace, contestants: list[tuple], results: Results) -> None:
    """Measures imports, loading and the first step, each time in a new process.

    The weight files are in the system's file cache. Memory-mapped weights are read from it during the first step.
    """
    for _ in range(min(3, options.runs)):
        for contestant in contestants:
            with workers([contestant]) as (worker,):
                imports, loading = worker.ask("imports")["seconds"], worker.ask("load")["seconds"]
                if "load" in options.only:
                    results.add("imports beyond torch, s", worker.name, imports)
                    results.add("load", worker.name, loading)
                if "first" in options.only:
                    worker.ask("read")
                    results.add("first", worker.name, time.perf_counter() - worker.started)
                    worker.ask("step")
                    results.add("to the end of that step, s", worker.name, time.perf_counter() - worker.started)


def large_things(options: argparse.Namespace, contestants: list[tuple], results: Results) -> None:
    """Measures the full-size networks; the contestants take turns."""
    with workers(contestants) as started:
        rates = {worker.name: worker.ask("gemm")["rate"] for worker in started}
        for worker in started:
            worker.ask("load")
        for measure in ("step", "picture", "decode", "encode"):
            if measure in options.only or (measure == "step" and "memory" in options.only):
                take_turns(options, measure, started, results)
            if measure in options.only and measure in TERAFLOPS:
                for name, rate in rates.items():
                    reached = TERAFLOPS[measure] * 1e12 / median(results.figures[measure][name])
                    results.add(f"{measure}, share of the GEMM rate", name, reached / rate)
        for name, rate in rates.items():
            results.add("GEMM rate, TFLOP/s", name, rate / 1e12)


def take_turns(options: argparse.Namespace, measure: str, started: list[Worker], results: Results) -> None:
    """Repeats one measure, each time for every contestant, then adds the peak memory of each so far."""
    steps = [options.steps] if measure == "picture" else []
    for worker in started:
        worker.ask("prepare", measure)
    for _ in range(1 if steps else options.runs):
        answers = {worker.name: worker.ask(measure, *steps) for worker in started}
        for name, answer in answers.items():
            results.add(measure, name, answer["seconds"])
        if options.quick and max(answer["seconds"] for answer in answers.values()) > SLOW:
            break
    if "memory" in options.only and measure in ("step", "picture"):
        for name, answer in answers.items():
            for kind in sorted({"resident", "device"} & answer.keys(), reverse=True):
                results.add(f"peak {kind} memory after a {measure}, GB", name, answer[kind])


def throughput(options: argparse.Namespace, started: list[Worker], results: Results) -> None:
    """Measures images per second for each batch size that fits into memory."""
    for worker in started:
        for count in BATCHES:
            worker.ask("prepare", "picture", 1, count)
            seconds = worker.ask("picture", options.steps, count)["seconds"]
            if seconds == math.inf:
                break
            results.add(f"{MEASURES['throughput']}, {count} at once", worker.name, count / seconds)


def make_weights(options: argparse.Namespace, reference: bool) -> tuple[Path, Path]:
    """The checkpoint, and a folder with the same weights in diffusers' format. Makes them if they are missing."""
    checkpoint = options.checkpoint or options.cache / "sd15.safetensors"
    if not checkpoint.exists():
        run(sys.executable, "scripts/benchmarks/synthetic_checkpoint.py", checkpoint)
    folder = options.cache / f"diffusers-{checkpoint.stem}-{checkpoint.stat().st_mtime_ns}"
    if reference and not folder.exists():
        run(sys.executable, "scripts/benchmarks/reference_networks.py", checkpoint, folder)
    for file in (checkpoint, *folder.rglob("*.safetensors")):
        with open(file, "rb") as opened:  # read it into the system's file cache
            while opened.read(1 << 24):
                pass
    return checkpoint, folder


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status("benchmark.py", lambda: benchmark(options), "interrupted; nothing was written.")


def benchmark(options: argparse.Namespace) -> None:
    """Measures what the options select, prints the table, and writes the JSON file."""
    from sd.runtime.devices import best_device, best_dtype

    results = Results()
    options.device = str(device := best_device(options.device))
    fast = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}[str(best_dtype(device))]
    dtypes = options.dtypes or ([fast] if options.quick else sorted({"fp32", fast}, reverse=True))
    small_things(options, results)
    if {"load", "first", "throughput", *LARGE} & set(options.only):
        reference = not options.alone and find_spec("diffusers") is not None and find_spec("transformers") is not None
        checkpoint, folder = make_weights(options, reference)
        libraries = [("sd", checkpoint)] + ([("diffusers", folder)] if reference else [])
        contestants = [(library, dtype, options.device, path) for dtype in dtypes for library, path in libraries]
        if {"load", "first"} & set(options.only):
            cold_starts(options, contestants, results)
        if options.compiled:
            contestants += [(library, fast, options.device, path, True) for library, path in libraries]
        if LARGE & set(options.only):
            large_things(options, contestants, results)
        for contestant in contestants if "throughput" in options.only else ():
            with workers([contestant]) as started:  # one at a time, because each keeps the memory of its peak
                started[0].ask("load")
                throughput(options, started, results)
    machine = describe_machine(options.device)
    print(f"{machine}\n\n{results.table()}")
    if options.json:
        write_json(options.json, {"machine": machine, "figures": results.figures})


def describe_machine(device: str) -> str:
    """The date, processor, GPU and version of torch, as one line."""
    import torch

    known = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.*)", known.read_text()) if known.exists() else []
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{time.strftime('%Y-%m-%d')}, {processor}, {cores} cores{gpu}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
