"""A U-Net in 16 bits rounds its output: no sampler may make that rounding grow, however many steps it takes."""

import pytest
import torch

from sd.samplers import SAMPLERS
from tests.support.gaussian import SCALE, best_output, consistent_output


def run(name, steps, dtype):
    """Denoise the Gaussian data of `gaussian`, with the input and the output of the perfect U-Net rounded to dtype."""
    sampler = SAMPLERS[name](torch.Generator().manual_seed(1))
    sampler.set_inference_timesteps(min(steps, sampler.max_steps))
    perfect = consistent_output if name == "lcm" else best_output
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, timestep in enumerate(sampler.timesteps):
        output = perfect(x.to(dtype).float(), sampler.alpha_bar[i])
        x = sampler.step(timestep, x, output.to(dtype).float())
    return x


@pytest.mark.filterwarnings("ignore:With .* steps this sampler starts")
@pytest.mark.parametrize("steps", [30, 200])
@pytest.mark.parametrize("name", SAMPLERS)
def test_rounding_does_not_grow(name, steps):
    exact = run(name, steps, torch.float32)
    assert 0.8 < exact.std() / SCALE < 1.2
    for dtype, most in ((torch.float16, 0.003), (torch.bfloat16, 0.02)):
        assert (run(name, steps, dtype) - exact).abs().max() < most
