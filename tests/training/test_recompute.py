"""Activation checkpointing: the same gradients, in less memory, and networks that can still be copied and changed."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch

from sd.training.gradients import plain_attention
from sd.training.low_rank import low_rank_changes, wearing
from sd.training.recompute import recompute_activations
from tests.support.synthetic import FEW_LAYERS, random_networks

CPU = torch.device("cpu")


def unet_inputs():
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return draw(2, 4, 8, 8), draw(2, 5, 32), torch.tensor([3, 700])


def gradients(network, parameters, inputs):
    with plain_attention(CPU):
        return torch.autograd.grad(network(*inputs).square().mean(), list(parameters))


@pytest.mark.parametrize("name, inputs", [("diffusion", unet_inputs()), ("clip", (torch.arange(10)[None],))])
def test_gradients_are_the_same(name, inputs):
    plain = getattr(random_networks(FEW_LAYERS), name).requires_grad_(True)
    changed = copy.deepcopy(plain)
    recompute_activations(changed)
    for one, other in zip(*(gradients(network, network.parameters(), inputs) for network in (plain, changed))):
        assert torch.equal(one, other)
    assert plain.state_dict().keys() == changed.state_dict().keys()


def test_a_copy_uses_its_own_weights():
    network = random_networks(FEW_LAYERS).diffusion
    recompute_activations(network)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        before = twin(*unet_inputs())
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(twin(*unet_inputs()), before)


def test_low_rank_changes_get_the_same_gradients():
    network = random_networks(FEW_LAYERS).diffusion
    changes = low_rank_changes(network, 2)
    student = wearing(network, changes)
    expected = gradients(student, changes.parameters(), unet_inputs())
    recompute_activations(student)
    for one, other in zip(expected, gradients(student, changes.parameters(), unet_inputs())):
        assert torch.equal(one, other)
    assert not [module for module in network.modules() if "Recomputed" in type(module).__name__]


def kept_numbers(network):
    """How many numbers the forward pass keeps for the backward pass."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*unet_inputs())
    return sum(sizes.values())


def test_fewer_numbers_are_kept():
    network = random_networks(FEW_LAYERS).diffusion.requires_grad_(True)
    before = kept_numbers(network)
    recompute_activations(network)
    assert kept_numbers(network) < 0.5 * before


MEASURE = """
import resource, sys, time
import torch
from sd.config import TINY
from sd.diffusion import Diffusion
from sd.training.gradients import plain_attention
from sd.training.recompute import recompute_activations

network = Diffusion(TINY.unet)
if sys.argv[1] == "True":
    recompute_activations(network)
with plain_attention(torch.device("cpu")):
    inputs = torch.randn(48, 4, 16, 16), torch.randn(48, 77, TINY.unet.context_width), torch.full((48,), 500)
    network(*inputs).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, time.process_time())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, the peak has another unit")
def test_peak_memory_of_the_tiny_unet():
    """Of a process that computes one gradient for 48 latents, in GB."""
    peaks = []
    for changed in (False, True):
        program = [sys.executable, "-c", MEASURE, str(changed)]
        peak, seconds = map(float, subprocess.run(program, capture_output=True, check=True, text=True).stdout.split())
        print(f"recomputed {changed}: at most {peak:.2f} GB, {seconds:.1f} s of CPU time")
        peaks.append(peak)
    assert peaks[1] < 0.7 * peaks[0]
