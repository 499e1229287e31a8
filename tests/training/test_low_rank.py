"""LoRA as it is trained: a network that wears it, and its file in our own reader and in diffusers."""

import pytest
import torch

from sd import load_models
from sd.checkpoints.files import write_checkpoint
from sd.config import ModelConfig
from sd.training.low_rank import LowRank, low_rank_changes, low_rank_state, wearing, write_low_rank
from tests.adapters.test_lora_parity import pipeline
from tests.support.marks import slow
from tests.support.synthetic import FEW_LAYERS, SD2_MICRO, random_models, random_state

CONFIGS = {"sd15": FEW_LAYERS, "sd2": SD2_MICRO}


def inputs(config: ModelConfig) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(2, 77, config.unet.context_width, generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator), context, torch.tensor([7, 900])


def trained(network: torch.nn.Module, rank: int = 4) -> torch.nn.ModuleDict:
    """Changes that are not zero any more, and that float16 holds exactly."""
    torch.manual_seed(3)
    changes = low_rank_changes(network, rank)
    for change in changes.values():
        change.up.data = (0.3 * torch.randn_like(change.up)).half().float()
        change.down.data = change.down.data.half().float()
    return changes


@pytest.fixture(params=["sd15", slow("sd2")])
def config(request):
    return CONFIGS[request.param]


def test_a_new_one_changes_nothing():
    models = random_models(FEW_LAYERS)
    worn = wearing(models.diffusion, low_rank_changes(models.diffusion, 4))
    assert torch.equal(worn(*inputs(FEW_LAYERS)), models.diffusion(*inputs(FEW_LAYERS)))


def test_the_weight_is_the_sum():
    weight = torch.randn(6, 5, 3, 3)
    change = LowRank(weight, rank=2)
    torch.nn.init.normal_(change.up)
    expected = weight.flatten(1) + change.up @ change.down  # (6, 45)
    assert torch.allclose(change(weight), expected.view(6, 5, 3, 3))
    assert LowRank(torch.zeros(4, 3), rank=8).up.shape == (4, 3)  # no rank is higher than the matrix's


def test_gradients_reach_the_changes_and_nothing_else():
    network = random_models(FEW_LAYERS).diffusion
    changes = trained(network)
    wearing(network, changes)(*inputs(FEW_LAYERS)).square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in changes.parameters())
    assert all(x.grad is None for x in network.parameters())


def test_the_file_gives_the_same_in_our_reader_and_in_diffusers(config, tmp_path):
    models = random_models(config)
    changes = trained(models.diffusion)
    write_low_rank(tmp_path / "style.safetensors", changes, models)
    with torch.no_grad():
        expected = wearing(models.diffusion, changes)(*inputs(config))
        plain = models.diffusion(*inputs(config))
    assert (expected - plain).abs().max() > 0.05

    state = random_state(config)
    write_checkpoint(tmp_path / "model.safetensors", state, config.to_dict())
    loras = [tmp_path / "style.safetensors"]
    ours = load_models(tmp_path / "model.safetensors", "cpu", torch.float32, tuned=False, loras=loras)
    assert torch.allclose(ours.diffusion(*inputs(config)), expected, atol=1e-4)

    pipe = pipeline(config, state)
    pipe.load_lora_weights(str(loras[0]))
    latents, context, timesteps = inputs(config)
    with torch.no_grad():
        theirs = pipe.unet(latents, timesteps, context).sample
    assert torch.allclose(theirs, expected, atol=1e-4)


def test_one_matrix_of_queries_keys_and_values_is_three_layers_in_the_file():
    models = random_models(FEW_LAYERS)
    state = low_rank_state(trained(models.diffusion), models)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to"
    downs = [state[f"{name}_{part}.lora_down.weight"] for part in "qkv"]
    assert all(torch.equal(down, downs[0]) for down in downs)
    assert state[f"{name}_q.lora_up.weight"].shape == (16, 4)
    assert state["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (4, 16, 1, 1)
    assert state["lora_unet_conv_in.lora_down.weight"].shape == (4, 4, 3, 3)
