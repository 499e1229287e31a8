"""The fast ways to an image, for `benchmark.py --few-steps`: fewer steps, a smaller decoder, or half of the work.

    python scripts/benchmarks/few_steps.py CHECKPOINT FOLDER     # writes a LoRA and a TAESD of random weights

Speed does not depend on the values of weights. So random ones stand in for those of an LCM-LoRA and a TAESD, and a
plain model for SD-Turbo.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn

from scripts.benchmarks.contestants import PROMPT, Ours
from scripts.benchmarks.synthetic_checkpoint import random_weight

RANK = 64  # of the published LCM-LoRA


@dataclass(frozen=True)
class Way:
    """How an image is drawn."""

    models: str = "plain"
    settings: dict = field(default_factory=dict)  # of `Request`
    cfg_interval: tuple[float, float] = (0, 1)


ONE_STEP = {"sampler_name": "euler", "n_inference_steps": 1, "timestep_spacing": "trailing", "do_cfg": False}
WAYS = {
    "guided": Way(),  # the others are compared with this one
    "guided in the first half only": Way(cfg_interval=(0, 0.5)),
    "guided, deep_cache=2": Way(settings={"deep_cache": 2}),
    "guided, deep_cache=3": Way(settings={"deep_cache": 3}),
    "LCM-LoRA, 4 steps, TAESD": Way("lcm", {"sampler_name": "lcm", "n_inference_steps": 4, "do_cfg": False}),
    "Turbo, 1 step, TAESD": Way("turbo", ONE_STEP),
}


class FewSteps(Ours):
    """This project, with the models of all ways."""

    def load(self, folder: str) -> None:
        """`folder` has what `write_add_ons` wrote."""
        from sd.adapters.tiny_autoencoder import load_tiny_autoencoder

        super().load()
        tiny = load_tiny_autoencoder(folder, self.device, self.dtype)
        lcm = self.models.with_loras([Path(folder) / "lora.safetensors"])
        self.ways = {"plain": self.models, "lcm": replace(lcm, **tiny), "turbo": replace(self.models, **tiny)}

    def way(self, name: str, steps: int = 20) -> np.ndarray:
        """One image, uint8 (1, H, W, 3). `steps` are those of the guided ways."""
        from sd.pipeline import decode_latents, denoise, encode_prompt, prepare
        from sd.request import Request

        way, size = WAYS[name], 8 * self.side
        models = self.ways[way.models]
        settings = {"sampler_name": "dpm++2m", "n_inference_steps": steps, **way.settings}
        request = Request(PROMPT, seed=0, height=size, width=size, **settings)
        request.check()
        context = encode_prompt(models, PROMPT, "" if request.do_cfg else None)
        sampler, latents, _ = prepare(models, request)
        run = {"cfg_interval": way.cfg_interval, "deep_cache": request.deep_cache}
        for step in denoise(models, latents, context, sampler, **run):
            latents = step.latents
        return decode_latents(models, latents)


def write_add_ons(checkpoint: Path, folder: Path) -> None:
    """Writes taesd_encoder.safetensors and taesd_decoder.safetensors, and a LoRA that changes every layer of the U-Net,
    lora.safetensors."""
    from sd.adapters.tiny_autoencoder import NETWORKS
    from sd.checkpoints.files import write_checkpoint
    from sd.checkpoints.whole_model import read_model
    from sd.models import empty_networks
    from sd.training.low_rank import low_rank_changes, low_rank_state

    generator = torch.Generator().manual_seed(0)
    for name, network in NETWORKS.items():
        shapes = {key.removeprefix("layers."): x.shape for key, x in network().state_dict().items()}
        state = {key: random_weight(key, tuple(shape), generator) for key, shape in shapes.items()}
        write_checkpoint(folder / f"taesd_{name}.safetensors", state)

    _, config = read_model(checkpoint)
    networks = empty_networks(config)
    changes = low_rank_changes(networks["diffusion"], RANK)
    for change in changes.values():
        nn.init.normal_(change.up, std=0.001)
    with torch.no_grad():
        state = low_rank_state(changes, SimpleNamespace(**networks, config=config))
    write_checkpoint(folder / "lora.safetensors", state)


if __name__ == "__main__":
    write_add_ons(*map(Path, sys.argv[1:]))
