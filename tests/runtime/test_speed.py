"""Tuned networks compute what plain ones do and return the same weights, and tuning can be switched off."""

import os
import subprocess
import sys

import pytest
import torch

from sd import generate, load_models
from sd.checkpoints.files import write_checkpoint
from sd.diffusion import Diffusion
from sd.inside.tracer import Tracer
from sd.model_converter import to_compvis
from sd.runtime.devices import on_device
from sd.runtime.speed import PackedConvolution, PackedGEGLU, can_pack, keep_freed_memory, memory_format, place_weights
from tests import ROOT
from tests.support.synthetic import MICRO, random_models, random_networks, random_state

CPU, CUDA, MPS, META = torch.device("cpu"), torch.device("cuda"), torch.device("mps"), torch.device("meta")

needs_packing = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU has no packed bfloat16: no AVX-512 or the like"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuning") / "micro.safetensors"
    write_checkpoint(path, random_state(MICRO), MICRO.to_dict())
    return path


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    return latents.to(dtype), context.to(dtype), torch.tensor([500, 500])


def packed(unet: Diffusion) -> int:
    return sum(isinstance(module, (PackedConvolution, PackedGEGLU)) for module in unet.modules())


@pytest.mark.parametrize(
    "device, dtype, format",
    [
        (CPU, torch.bfloat16, torch.channels_last),
        (CUDA, torch.float16, torch.channels_last),
        (CPU, torch.float32, torch.preserve_format),
        (MPS, torch.float16, torch.preserve_format),
    ],
)
def test_memory_format(device, dtype, format):
    assert memory_format(torch.zeros(4, 4, 3, 3), device, dtype) == format
    assert memory_format(torch.zeros(4, 4), device, dtype) == torch.preserve_format


def test_keep_freed_memory_can_be_called_twice():
    keep_freed_memory()
    keep_freed_memory()


@needs_packing
@torch.no_grad()
def test_packed_weights_compute_the_same():
    unet = random_networks(MICRO).diffusion.bfloat16()
    expected = unet(*inputs(torch.bfloat16)).float()
    reference = random_networks(MICRO).diffusion(*inputs(torch.float32))
    place_weights(unet, lambda weight: weight, pack=True)
    assert packed(unet) > 40
    actual = unet(*inputs(torch.bfloat16)).float()
    error = (actual - reference).norm() / reference.norm()
    assert error < 0.03
    assert error < 1.3 * (expected - reference).norm() / reference.norm()  # about as exact as plain bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_weights_are_those_that_were_loaded(checkpoint, dtype):
    tuned, plain = (to_compvis(load_models(checkpoint, "cpu", dtype, tuned=tuned)) for tuned in (True, False))
    assert tuned.keys() == plain.keys()
    assert all(torch.equal(tuned[key], plain[key]) for key in plain)


@needs_packing
def test_tuning_can_be_switched_off(checkpoint):
    plain = load_models(checkpoint, "cpu", torch.bfloat16, tuned=False)
    assert packed(plain.diffusion) == 0
    assert plain.diffusion.down[0][0].weight.is_contiguous()
    tuned = load_models(checkpoint, "cpu", torch.bfloat16)
    counts = [sum(p.numel() for p in models.diffusion.parameters()) for models in (plain, tuned)]
    assert counts[0] == counts[1]
    assert packed(tuned.diffusion) > 40
    assert tuned.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_float32_keeps_the_files_own_memory(checkpoint):
    models = load_models(checkpoint, "cpu", torch.float32)
    assert packed(models.diffusion) == 0
    assert models.diffusion.down[0][0].weight.is_contiguous()


def test_a_tuned_image_equals_the_plain_one_up_to_rounding(checkpoint):
    pictures = [
        generate("a cat", models=load_models(checkpoint, "cpu", torch.bfloat16, tuned=tuned), seed=0).astype(int)
        for tuned in (True, False)
    ]
    assert abs(pictures[0] - pictures[1]).mean() < 3


@pytest.mark.slow
def test_a_processor_without_the_instructions_packs_nothing(checkpoint):
    """oneDNN has no packed bfloat16 for AVX2 alone: loading would raise."""
    code = (
        "import torch; from sd import load_models;"
        f"models = load_models({str(checkpoint)!r}, 'cpu', torch.bfloat16);"
        "models.diffusion(torch.zeros(1, 4, 8, 8).bfloat16(), torch.zeros(1, 77, 32).bfloat16(), torch.tensor([5]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, cwd=ROOT)


@needs_packing
def test_packed_weights_cannot_move(checkpoint):
    unet = load_models(checkpoint, "cpu", torch.bfloat16).diffusion
    with (
        pytest.raises(ValueError, match="Packed weights cannot move to meta: load the models there"),
        on_device(unet, META),
    ):
        pass


def test_compiled_networks_cannot_move():
    models = random_models(MICRO)
    models.diffusion.compile(backend="eager")
    with pytest.raises(ValueError, match="idle_device should be None for compiled models"):
        generate("a cat", models=models, idle_device="cpu")


def test_a_tracer_refuses_compiled_networks():
    models = random_models(MICRO)
    models.decoder.compile(backend="eager")
    with pytest.raises(ValueError, match="should be loaded without compiled=True for a Tracer"):
        Tracer(models)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@torch.no_grad()
def test_compiled_networks_compute_the_same(checkpoint, dtype, tolerance):
    expected = load_models(checkpoint, "cpu", torch.float32).diffusion(*inputs(torch.float32))
    models = load_models(checkpoint, "cpu", dtype, compiled=True)
    assert packed(models.diffusion) == 0  # the compiler chooses these kernels itself
    actual = models.diffusion(*inputs(dtype)).float()
    assert (actual - expected).norm() / expected.norm() < tolerance
