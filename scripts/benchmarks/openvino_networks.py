"""Our U-Net and decoder as OpenVINO's files, for the benchmark: unet.xml, decoder.xml, and their weights in float32.

    python scripts/benchmarks/openvino_networks.py CHECKPOINT FOLDER

OpenVINO is optional: requirements-benchmark.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import openvino
import torch

from sd import load_models


@torch.no_grad()
def convert(checkpoint: Path, folder: Path) -> None:
    """Writes the files. OpenVINO follows one call of each network; the sizes of its inputs can be changed later."""
    models = load_models(checkpoint, "cpu", torch.float32, tuned=False)
    unet, latents = models.config.unet, torch.randn(2, models.config.vae.latent_channels, 8, 8)
    context = torch.randn(2, 77, unet.context_width)
    examples = {
        "unet": (models.diffusion, (latents, context, torch.tensor([500, 500]))),
        "decoder": (models.decoder, (latents[:1],)),
    }
    incomplete = folder.with_name(f".{folder.name}.incomplete")
    for name, (network, inputs) in examples.items():
        converted = openvino.convert_model(network, example_input=inputs)
        openvino.save_model(converted, incomplete / f"{name}.xml", compress_to_fp16=False)
    incomplete.rename(folder)


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:]))
