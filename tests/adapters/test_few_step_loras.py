"""LCM-LoRA, TCD's and Hyper-SD's LoRAs: files in kohya's naming for all layers of the U-Net's blocks. They load as any
LoRA does, and set neither a sampler nor steps nor guidance."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sd import generate, load_models
from sd.checkpoints.files import write_checkpoint
from tests.support import synthetic_lora
from tests.support.synthetic import MICRO, random_state

pytest.importorskip("diffusers")

from tests.parity import reference

# The layers that diffusers' training script for LCM-LoRA names.
TARGETS = r"\.(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut|time_emb_proj"
TARGETS += r"|downsamplers\.0\.conv|upsamplers\.0\.conv)$"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, a LoRA for it, and the number of its layers."""
    folder = tmp_path_factory.mktemp("lora")
    write_checkpoint(folder / "micro.safetensors", random_state(MICRO), MICRO.to_dict())
    layers = synthetic_lora.layers(reference.unet(MICRO, random_state(MICRO)), None)
    parts = synthetic_lora.lora({name: x for name, x in layers.items() if re.search(TARGETS, name)}, alpha=8, rank=8)
    state = {key: tensor.half() for key, tensor in synthetic_lora.file_state(parts).items()}
    assert all(key.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")) for key in state)
    save_file(state, folder / "lcm-lora.safetensors")
    return folder / "micro.safetensors", folder / "lcm-lora.safetensors", len(parts)


def test_all_its_layers_change_and_nothing_else(files):
    checkpoint, lora, count = files
    assert count == 277  # SD 1.5 has one more, since all its levels differ in width
    plain, fast = (load_models(checkpoint, "cpu", torch.float32, tuned=False, loras=given) for given in ([], [lora]))
    assert fast.config == plain.config == MICRO
    before, after = plain.diffusion.state_dict(), fast.diffusion.state_dict()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == 277 - 2 * 16  # queries, keys and values of self-attention are one matrix here
    assert not any(key.endswith("bias") for key in changed)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["lcm", "tcd", "euler_a"])
def test_it_draws(files, sampler):
    checkpoint, lora, _ = files
    fast = load_models(checkpoint, "cpu", torch.float32, loras=[lora])
    options = {"cfg_scale": 1.5, "n_inference_steps": 2, "timestep_spacing": "trailing", "height": 32, "width": 32}
    images = [
        generate("a cat", models=each, seed=1, sampler_name=sampler, **options) for each in (fast, fast.with_loras([]))
    ]
    assert not np.array_equal(*images)
