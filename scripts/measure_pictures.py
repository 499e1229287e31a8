"""Measure the pictures in a folder: FID against reference pictures, and the CLIP score of pictures and their prompts.

    python scripts/measure_pictures.py --pictures runs/pictures
    python scripts/measure_pictures.py --pictures runs/pictures --reference photographs

The prompts are those in manifest.jsonl, which sample.py writes into its folder. FID is computed by clean-fid, the CLIP
score by torchmetrics: pip install -r requirements-metrics.txt. The networks of both were trained on photographs, so
for the tiny model use evaluate_tiny.py. sd/training/README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, exit_status

MANIFEST = "manifest.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of those that clean-fid reads
# Not ViT-L/14, which is the text encoder of Stable Diffusion 1.x: its own would flatter it.
CLIP = "openai/clip-vit-base-patch16"
ENOUGH = 10_000  # pictures: with fewer, FID is clearly too high
INSTALL = "pip install -r requirements-metrics.txt"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("measure_pictures.py", __doc__)
    add = parser.add_argument
    add("--pictures", type=Path, required=True, metavar="FOLDER", help="the pictures to measure")
    add("--reference", type=Path, metavar="FOLDER", help="real pictures of the same kind, for FID")
    help = f"the pictures' prompts, for the CLIP score: a {MANIFEST} as sample.py writes it (that in the folder)"
    add("--prompts", type=Path, metavar="FILE", help=help)
    add("--clip", default=CLIP, metavar="NAME", help=f"the network of the CLIP score ({CLIP})")
    add("--batch", type=int, default=32, metavar="N", help="pictures at a time (32)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first available one)")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch should be at least 1, not {options.batch}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status("measure_pictures.py", lambda: measure(options), "interrupted.")


def measure(options: argparse.Namespace) -> None:
    """Prints the numbers, each with the number of pictures. Raises ValueError, ImportError or OSError, in one sentence,
    before anything is computed."""
    pictures = list_pictures("--pictures", options.pictures)
    reference = list_pictures("--reference", options.reference) if options.reference else []
    manifest = options.prompts or options.pictures / MANIFEST
    pairs = read_pairs(manifest, options.pictures) if options.prompts or manifest.is_file() else []
    if not reference and not pairs:
        raise ValueError(f"--reference should be given, or --prompts: there is no {manifest}.")
    if reference:
        need("--reference", "cleanfid", "clean-fid")
    if pairs:
        need("the CLIP score", "torchmetrics", "torchmetrics")
        need("the CLIP score", "transformers", "transformers")
    from sd.runtime.devices import best_device

    device = best_device(options.device)
    if reference:
        fid = frechet_distance(options.pictures, options.reference, options.batch, device)
        print(f"FID {fid:.2f}, of {len(pictures):,} pictures and {len(reference):,} references")
        if min(len(pictures), len(reference)) < ENOUGH:
            print(f"With fewer than {ENOUGH:,} pictures, FID is too high: compare it only at equal numbers.")
    if pairs:
        print(f"CLIP score {clip_score(pairs, options.clip, options.batch, device):.2f}, of {len(pairs):,} pictures")


def list_pictures(flag: str, folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders. Raises ValueError for fewer than two."""
    if not folder.is_dir():
        raise ValueError(f"{flag} should be a folder: there is none at {folder}.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) < 2:
        raise ValueError(f"{flag} should be a folder with at least 2 pictures, not {len(found)} as in {folder}.")
    return found


def read_pairs(manifest: Path, folder: Path) -> list[tuple[Path, str]]:
    """The pictures that a manifest lists, and their prompts, without those that failed. Raises ValueError for a line
    that is broken and for a picture that is missing, OSError if the manifest cannot be read."""
    if not manifest.is_file():
        raise ValueError(f"--prompts should be a file: there is none at {manifest}.")
    pairs = []
    for number, line in enumerate(manifest.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, prompt = entry["file"], entry["prompt"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f'Line {number} of {manifest} should be an object with "file" and "prompt".') from None
        if name is None:  # it could not be drawn
            continue
        if not (folder / name).is_file():
            raise ValueError(f"{folder} should have all pictures that {manifest} lists: {name} is missing.")
        pairs.append((folder / name, prompt))
    if not pairs:
        raise ValueError(f"{manifest} should list at least one picture.")
    return pairs


def need(what: str, module: str, package: str) -> None:
    """Raises ImportError, with the command that installs it, if an optional package is missing."""
    if find_spec(module) is None:
        raise ImportError(f"{what} needs the package {package}: {INSTALL}")


def frechet_distance(pictures: Path, reference: Path, batch: int, device: torch.device) -> float:
    """FID: how far the pictures are from the references, as two normal distributions of Inception's features
    (1706.08500, eq. 6), with pictures resized as in 2104.11222."""
    from cleanfid import fid

    options = {"mode": "clean", "num_workers": 0, "batch_size": batch, "device": device}
    try:
        return fid.compute_fid(str(pictures), str(reference), verbose=False, use_dataparallel=False, **options)
    except OSError as error:
        raise OSError(f"clean-fid cannot fetch or read what it needs ({_first_line(error)}).") from error


def clip_score(pairs: list[tuple[Path, str]], name: str, batch: int, device: torch.device) -> float:
    """100 times the mean cosine of CLIP's vectors of a picture and of its prompt (2104.08718); at least 0."""
    import numpy as np
    from torch import from_numpy
    from torchmetrics.multimodal.clip_score import CLIPScore
    from tqdm import tqdm

    from sd.images import read_image

    metric = CLIPScore(lambda: load_clip(name)).to(device)
    for start in tqdm(range(0, len(pairs), batch), "CLIP score"):
        part = pairs[start : start + batch]
        images = [from_numpy(np.array(read_image(path))).permute(2, 0, 1).to(device) for path, _ in part]  # (3, H, W)
        metric.update(images, [prompt for _, prompt in part])
    return metric.compute().item()


def load_clip(name: str) -> tuple:
    """CLIP with both encoders and its processor, as torchmetrics uses them. Raises OSError if it cannot be fetched."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, processor = CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name)
    except OSError as error:
        raise OSError(f"--clip {name} cannot be loaded ({_first_line(error)}).") from error
    for method in ("get_image_features", "get_text_features"):
        setattr(model, method, _tensor_of(getattr(model, method)))
    return model, processor


def _tensor_of(method: Callable) -> Callable:
    """The method, with a tensor as its result: since version 5 of transformers, it is an object, for which torchmetrics
    1.9 is not made."""

    def tensor(*arguments):
        result = method(*arguments)
        return getattr(result, "pooler_output", result)

    return tensor


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
