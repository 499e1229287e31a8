"""Draws the pictures of a file of prompts into a folder: on one device, or on many under torchrun.

    python scripts/sample.py --prompts prompts.txt --out runs/pictures
    python scripts/sample.py --prompts prompts.csv --out runs/pictures --steps 20 --cfg-scale 7 --batch 4
    torchrun --nproc-per-node 8 scripts/sample.py --prompts prompts.jsonl --out /shared/pictures --checkpoint sd15.ckpt

A line of prompts.txt is a prompt. prompts.csv has a header with names of settings: prompt, seed, width, ... On each
line of prompts.jsonl there is an object of them. manifest.jsonl in the folder lists the pictures.

After an interruption, the same command makes the pictures that are missing. A prompt that cannot be drawn is recorded
in the manifest and stops nothing; the exit status is then 2. scripts/README.md explains how it works and what it costs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from scripts.support.manifest import Folder
    from scripts.support.prompts_files import Item, Read
    from scripts.support.work_queue import Ranks
    from sd.models import Models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.captions import DTYPES
from scripts.support.command_line import Once, RankParser, import_torch, run
from scripts.support.defaults import with_defaults
from scripts.support.flags import with_flags
from scripts.support.loras import find, flag_value, given_loras
from scripts.support.saved_settings import parameters
from scripts.support.work_queue import WAIT, Refused, connect, find_problem, launched, own_device

PROGRAM = "sample.py"
CUDA_BATCH = 8  # `benchmark.py --only throughput` measures others; one picture at a time keeps a CPU busy

# Settings of `Request` that all lines share -> the options that give them.
COMMON = {
    "uncond_prompt": "negative",
    "sampler_name": "sampler",
    "n_inference_steps": "steps",
    "cfg_scale": "cfg_scale",
    "width": "width",
    "height": "height",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options. Raises ValueError, in one sentence, for flags that do not exist or lack a value."""
    parser = RankParser(PROGRAM, __doc__)
    add = parser.add_argument
    help = "a .txt, .csv or .jsonl file: a prompt, a row or an object on each line"
    add("--prompts", type=Path, required=True, action=Once, metavar="FILE", help=help)
    help = "a folder for the pictures and manifest.jsonl; all machines must share it"
    add("--out", type=Path, required=True, action=Once, metavar="FOLDER", help=help)
    add("--negative", metavar="TEXT", help="what the pictures should not show")
    add("--steps", type=int, metavar="N", help="sampling steps (default: the sampler's own)")
    add("--cfg-scale", type=float, metavar="S", help="how closely to follow the prompt (7.5; tiny model: 5)")
    add("--sampler", metavar="NAME", help="sampling algorithm (dpm++2m)")
    add("--seed", type=int, default=0, metavar="N", help="picture i, from 0, has seed N + i, or its line's own (0)")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    help = "Stable Diffusion 1.x or 2.x: a file, a folder or owner/name on the hub (default: the tiny model)"
    add("--checkpoint", type=Path, metavar="PATH", help=help)
    help = "a LoRA for all pictures, its strength (1), and that for the text encoder; repeatable"
    add("--lora", action="append", metavar="FILE[:S[:S]]", help=help)
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first available; a GPU for each rank)")
    add("--dtype", choices=DTYPES, help="precision (default: the fastest without a visible loss)")
    add("--batch", type=int, metavar="N", help=f"pictures at a time, of equal settings ({CUDA_BATCH} on CUDA, else 1)")
    help = "also pack the pictures into tar files of WebDataset, N to each, in FOLDER/shards"
    add("--shards", type=int, metavar="N", help=help)
    help = f"time limit for other ranks; longer than the slowest batch ({WAIT})"
    add("--wait", type=float, default=WAIT, metavar="SECONDS", help=help)
    options = parser.parse_args(arguments)
    for name in ("batch", "shards", "wait"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} should be above 0, not {value:g}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    rank = int(os.environ["RANK"]) if launched() else 0
    options, problem = None, ""
    try:
        options = parse(arguments)
    except ValueError as error:
        problem = str(error)

    def work() -> int:
        try:
            return sample(options, problem)
        except Refused:
            return 2
        except KeyboardInterrupt:
            if rank == 0:
                raise  # one line is enough
            return 130

    def explain(error: Exception) -> str:
        return f"rank {rank}: {error}" if launched() else str(error)

    return run(PROGRAM, work, "interrupted; run the same command again to make the missing pictures.", explain)


def say(line: str) -> None:
    print(f"{PROGRAM}: {line}", file=sys.stderr)


def sample(options: argparse.Namespace | None, problem: str = "") -> int:
    """Draws this rank's share of the pictures. Returns the exit status. `problem` is what is wrong with the flags.

    What is wrong before the first picture is printed by rank 0, once, and raises Refused on all ranks. What stops a
    rank later, such as a full disk, raises OSError there, and torchrun stops the others.
    """
    if problem and not launched():
        raise ValueError(problem)  # before torch, which takes seconds to import
    import_torch()
    from scripts.support.manifest import MANIFEST, Folder
    from scripts.support.shards import SHARDS, write_shards

    ranks = connect(options.wait if options else WAIT, say)
    _show_warnings_once(ranks.rank == 0)
    read, models, batch = begin(options, problem, ranks)
    items = [with_model_defaults(item, models) for item in read.items]
    folder, started = Folder(options.out, items, ranks.rank, partial(describe_picture, options)), time.perf_counter()
    draw_all(folder, models, batch, ranks)
    if ranks.rank > 0:
        return 0
    failed = folder.merge()
    print(f"{options.out}  {len(items) - failed} pictures  {time.perf_counter() - started:.1f} s", flush=True)
    if options.shards:
        print(f"{options.out / SHARDS}  {write_shards(options.out, options.shards)} shards", flush=True)
    if failed:
        say(f"{failed} of {len(items)} pictures failed: {options.out / MANIFEST} says why.")
    return 2 if failed else 0


def begin(options: argparse.Namespace | None, problem: str, ranks: Ranks) -> tuple[Read, Models, int]:
    """What the file of prompts says, the models, and the size of batches, once all ranks have them and agree. From then
    on, the folder belongs to this job.

    Raises Refused, on all ranks, if anything is wrong on one of them, and ValueError if they do not share the folder.
    """
    from scripts.support.manifest import JOB, check_folder, claim
    from scripts.support.prompts_files import NOTHING

    read, models, device, batch, job = NOTHING, None, None, 0, {}
    if not problem:
        try:
            device = own_device(options.device)
            read = read_prompts(options)
            job = describe_job(options, read.digest)
            batch = options.batch or (CUDA_BATCH if device.type == "cuda" else 1)
        except (ValueError, OSError) as error:
            problem = str(error)
    mine = {"problem": problem, "arguments": job | {"--out": str(options and options.out), "--batch": batch}}
    ranks.agree("job", mine, lambda said: find_problem(said) or check_folder(options.out, job))
    try:
        models = load(options, device)
    except (ValueError, OSError, MemoryError, ImportError) as error:
        problem = with_flags(str(error))
    ranks.agree("models", {"problem": problem}, lambda said: find_problem(said) or claim(options.out, job))
    if not (options.out / JOB).is_file():
        raise ValueError(f"--out should be a folder that all ranks share: {options.out / JOB} is missing here.")
    for line in read.notes if ranks.rank == 0 else ():
        say(line)
    return read, models, batch


def _show_warnings_once(shown: bool) -> None:
    """Prints each warning once, as a line, on the rank where they are shown."""
    said = set()

    def show(message: Warning, *_: object) -> None:
        line = with_flags(str(message))
        if shown and line not in said:
            said.add(line)
            say(line)

    warnings.showwarning = show


def read_prompts(options: argparse.Namespace) -> Read:
    """The pictures of --prompts. Raises ValueError or OSError for a file that cannot be read, and for flags that no
    picture can have."""
    from scripts.support.prompts_files import read_items
    from sd.request import Request

    common = {name: getattr(options, option) for name, option in COMMON.items()}
    common = {name: value for name, value in common.items() if value is not None}
    try:
        Request("", seed=options.seed, **common).check()
    except ValueError as error:
        raise ValueError(with_flags(str(error))) from None
    return read_items(options.prompts, common, options.seed, given_loras(options))


def describe_job(options: argparse.Namespace, digest: str) -> dict[str, str | None]:
    """What a later run in the same folder must have in common with this one, and all ranks with each other."""
    flags = {
        f"--{option.replace('_', '-')}": getattr(options, option) for option in [*COMMON.values(), "seed", "dtype"]
    }
    flags["--lora"] = ", ".join(map(flag_value, find((), given_loras(options))[0]))
    checkpoint = flags["--checkpoint"] = options.checkpoint
    if checkpoint and checkpoint.is_file():  # another machine may have it elsewhere
        flags["--checkpoint"] = f"{checkpoint.name} ({checkpoint.stat().st_size} bytes)"
    flags["the content of --prompts"] = digest
    return {flag: None if value in (None, "") else str(value) for flag, value in flags.items()}


def load(options: argparse.Namespace, device: torch.device) -> Models:
    """The models, with the LoRAs of --lora. Raises what `load_models` raises."""
    import torch

    from sd.model_loader import load_models

    loras, _ = find((), given_loras(options))
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    return load_models(options.checkpoint, device, dtype, loras=loras)


def with_model_defaults(item: Item, models: Models) -> Item:
    """The item with the model's own size and settings where it has none."""
    return item if item.request is None else replace(item, request=with_defaults(item.request, models))


def describe_picture(options: argparse.Namespace, item: Item) -> str:
    """The text of an item's settings, as demo.py writes it into its pictures."""
    request = item.request
    of_demo = {"checkpoint": options.checkpoint, "vae": None, "embedded": {}, "image": request.input_image is not None}
    of_demo |= {"control": list(request.control or ()), "control_from": None}
    return parameters(argparse.Namespace(**of_demo), request, item.loras)


def draw_all(folder: Folder, models: Models, batch: int, ranks: Ranks) -> None:
    """Draws batches from the queue until it is empty, and waits until all ranks have finished theirs: the first one to
    leave may be on the machine that has the store."""
    from tqdm import tqdm

    from scripts.support.batches import make_batches

    batches = make_batches(folder.items, batch, models)
    total = sum(map(len, batches))
    with tqdm(total=total, unit="picture", disable=ranks.rank > 0) as bar:

        def show(finished: int) -> None:
            bar.update(finished - bar.n)

        while (number := ranks.take()) < len(batches):
            models = draw_missing(batches[number], models, folder)
            show(ranks.finish(len(batches[number])))
        ranks.wait_for(total, show)
    ranks.leave()


def draw_missing(batch: list[Item], models: Models, folder: Folder) -> Models:
    """Draws a batch, and writes those of its pictures that are missing. Returns the models with the batch's LoRAs.

    The batch is drawn as a whole: a picture then has the same bytes as without the interruption. If that fails, each
    picture is drawn alone, and those that fail are recorded. Raises OSError if a file cannot be written.
    """
    from scripts.support.batches import draw

    missing = {item.index for item in batch if not folder.has(item)}
    if not missing:
        return models
    started = time.perf_counter()
    try:
        if models.loras != batch[0].loras:
            models = models.with_loras(batch[0].loras)
        images = draw([item.request for item in batch], models)
    except (ValueError, OSError, MemoryError) as error:
        if len(batch) == 1:
            folder.fail(batch[0], str(error))
        else:
            for item in batch:
                models = draw_missing([item], models, folder)
        return models
    seconds = round((time.perf_counter() - started) / len(batch), 3)
    for item, image in zip(batch, images):
        if item.index in missing:
            folder.write(item, image, seconds)
    return models


if __name__ == "__main__":
    sys.exit(main())
