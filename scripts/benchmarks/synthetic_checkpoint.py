"""Writes a full-size Stable Diffusion 1.5 checkpoint of random weights, to measure speed and memory.

    python scripts/benchmarks/synthetic_checkpoint.py runs/synthetic.safetensors      # 4.3 GB; .ckpt works as well

It has the names, shapes and sizes of the real file, and weights that keep activations at about unit scale. So programs
take as much time and memory as with the real file, without a download.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.support.command_line import Parser, exit_status

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sd.config import ModelConfig


def random_weight(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One weight, scaled by its role so that activations neither vanish nor explode."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if key.endswith(("_embedding.weight", "positional_embedding")):
        return noise.mul_(0.5)
    if key.endswith("bias"):
        return noise.mul_(0.02)
    if len(shape) == 1:
        return noise.mul_(0.1).add_(1)
    return noise.div_(math.sqrt(math.prod(shape[1:])))


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint in the CompVis layout."""
    import torch

    from sd.model_converter import POSITION_IDS, compvis_shapes

    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(config.text.context_length)[None]
    shapes = compvis_shapes(config)
    return {
        key: positions if key == POSITION_IDS else random_weight(key, shape, generator) for key, shape in shapes.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks/synthetic_checkpoint.py", __doc__)
    parser.add_argument("out", type=Path, metavar="FILE", help="a .safetensors or .ckpt file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random weights (0)")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} exists already: choose another name.")
    return exit_status(
        "benchmarks/synthetic_checkpoint.py", lambda: write(options), "interrupted; nothing was written."
    )


def write(options: argparse.Namespace) -> None:
    from sd.checkpoints.files import TORCH_SUFFIXES, write_checkpoint
    from sd.config import SD15

    if options.out.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"The name of {options.out} should end in .safetensors, {', '.join(TORCH_SUFFIXES)}.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(options.out, random_state(SD15, options.seed))


if __name__ == "__main__":
    sys.exit(main())
