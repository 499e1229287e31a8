"""Device transfers, on a simulated GPU (`tests.support.accelerator`): every tensor is on the right device, pictures
equal those of the CPU, and the CPU waits for the device once in every step."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sd import generate, load_models, pipeline
from sd.checkpoints.files import write_checkpoint
from sd.inside.preview import preview_for
from sd.inside.recording import record
from sd.inside.tracer import Tracer
from sd.prompts.embeddings import mix, replace, slerp
from sd.request import Request
from sd.runtime.decode_in_strips import InStrips
from sd.training import stages
from sd.training.loop import load_state
from tests.support.accelerator import accelerator
from tests.support.marks import slow
from tests.support.synthetic import FEW_LAYERS, INPAINTING_MICRO, MICRO, random_state

CONFIGS = {"ordinary": MICRO, "inpainting": INPAINTING_MICRO}
QUICK = {"n_inference_steps": 3, "height": 40, "width": 32, "seed": 1}
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
MASK = np.repeat(np.uint8([0, 255]), [12, 20])[None].repeat(40, 0)  # (40, 32), the right part white


@pytest.fixture(scope="module", params=["cuda:0", pytest.param("mps:0", marks=pytest.mark.slow)])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def pairs(device, tmp_path_factory):
    """The same random weights on the CPU and on the accelerator, for ordinary pictures and for inpainting."""
    pairs = {}
    for name, config in CONFIGS.items():
        path = tmp_path_factory.mktemp("weights") / f"{name}.ckpt"
        write_checkpoint(path, random_state(config), config.to_dict())
        with accelerator(device):
            pairs[name] = load_models(path, "cpu", torch.float32), load_models(path, device, torch.float32)
    return pairs


@pytest.fixture
def models(pairs):
    return pairs["ordinary"]


def assert_alike(a, b):
    assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.parametrize("name", ["ordinary", slow("inpainting")])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"do_cfg": False, "sampler_name": "euler_a"}),
        {"cfg_rescale": 0.7, "sampler_name": "ddpm"},
        {"deep_cache": 2, "sampler_name": "heun"},
        slow({"input_image": PICTURE, "strength": 0.7, "sampler_name": "dpm++2m_sde_karras"}),
        {"input_image": PICTURE, "mask_image": MASK, "strength": 1, "feather": 4, "sampler_name": "lms"},
    ],
)
def test_pictures_are_those_of_the_cpu(pairs, device, name, settings):
    here, there = pairs[name]
    prompts = ["a (cat:1.3)", "a dog BREAK a cat"]
    expected = generate(prompts, "red", models=here, **QUICK, **settings)
    with accelerator(device):
        assert_alike(generate(prompts, "red", models=there, **QUICK, **settings), expected)


def test_the_cpu_waits_once_a_step_to_check_for_nan(models, device):
    with accelerator(device) as active:
        context = pipeline.encode_prompt(models[1], "a cat", "")
        sampler, latents, _ = pipeline.prepare(
            models[1], Request("", sampler_name="dpm++2m", n_inference_steps=5, seed=1)
        )
        active.waits.clear()
        steps = list(pipeline.denoise(models[1], latents, context, sampler))
    assert steps[-1].latents.device == torch.device(device)
    assert sum(active.waits.values()) == 5


def test_half_precision_is_the_default(pairs, device, tmp_path):
    write_checkpoint(tmp_path / "micro.ckpt", random_state(MICRO), MICRO.to_dict())
    expected = generate("a cat", models=pairs["ordinary"][0], **QUICK)
    with accelerator(device):
        models = load_models(tmp_path / "micro.ckpt", device)
        picture = generate("a cat", models=models, **QUICK)
    assert {parameter.dtype for parameter in models.diffusion.parameters()} == {torch.float16}
    assert np.abs(picture.astype(int) - expected).mean() < 3


def test_idle_networks_wait_on_the_cpu(device, tmp_path):
    """The networks wait on the CPU, and all return there."""
    write_checkpoint(tmp_path / "micro.ckpt", random_state(MICRO), MICRO.to_dict())
    models = load_models(tmp_path / "micro.ckpt", "cpu", torch.float32)
    settings = {**QUICK, "input_image": PICTURE}
    expected = generate("a cat", models=models, **settings)
    with accelerator(device) as active:
        picture = generate("a cat", models=models, device=device, idle_device="cpu", **settings)
    networks = (models.clip, models.encoder, models.diffusion, models.decoder)
    assert active.waits
    assert {parameter.device.type for network in networks for parameter in network.parameters()} == {"cpu"}
    assert_alike(picture, expected)


def test_guidance_by_a_loss(models, device):
    def dark(pictures):
        return 50 * (pictures + 1).square().mean()

    def run(models):
        context = pipeline.encode_prompt(models, "a cat", "")
        sampler, latents, _ = pipeline.prepare(
            models, Request("", sampler_name="euler", n_inference_steps=3, seed=1, height=40, width=32)
        )
        return [step.latents.cpu() for step in pipeline.denoise(models, latents, context, sampler, guidance=dark)][-1]

    expected = run(models[0])
    with accelerator(device):
        torch.testing.assert_close(run(models[1]), expected, rtol=1e-3, atol=1e-3)


def test_embeddings(models, device):
    def change(models):
        tokens = models.tokenizer("a picture of a cat").to(models.device)
        table, positions = models.clip.token_embedding.weight, models.clip.position_embedding.weight
        chimera = mix([table[2368], table[12952]], [0.4, 0.6])
        context = models.clip.encode(replace(models.clip.embed(tokens), tokens == 2368, chimera, positions))
        return slerp(context, pipeline.encode_prompt(models, "a dog", None), 0.5).cpu()

    expected = change(models[0])
    with accelerator(device):
        torch.testing.assert_close(change(models[1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_looking_inside(models, device):
    def look(models):
        with Tracer(models, ["diffusion.middle", "decoder.levels.1"], attention=True) as trace:
            picture = generate("a red house", models=models, **QUICK)
        latents = pipeline.get_latents(models, 1, 40, 32, seed=1)
        word, feature = trace.word_map("house", "a red house"), trace.activation("decoder.levels.1")
        return picture, preview_for(models)(latents), word.numpy(), feature.numpy()  # all of it on the CPU

    expected = look(models[0])
    with accelerator(device):
        seen = look(models[1])
    for one, other in zip(seen[:2], expected[:2]):
        assert_alike(one, other)
    for one, other in zip(seen[2:], expected[2:]):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.slow
def test_a_recording(models, device):
    expected = record(Request("a cat", **QUICK), models[0])
    with accelerator(device):
        recording = record(Request("a cat", **QUICK), models[1])
    assert_alike(recording.image, expected.image)
    assert {moment.latents.device.type for moment in recording.moments} == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, made",
    [
        (["--report", "cat.html"], {"cat.html"}),
        (["--film", "cat.webp", "--image", "cat.png", "--mask", "cat.png"], {"cat.webp"}),
        (["--grid", "--n", 2], {"it-2.png", "it-grid.png"}),
    ],
)
def test_the_demo(run_demo, device, tmp_path, options, made):
    Image.fromarray(PICTURE).save(tmp_path / "cat.png")
    with accelerator(device):
        code, _, errors = run_demo("a cat", "--out", "it.png", "--device", device, *options)
    assert code == 0, errors
    assert {path.name for path in tmp_path.iterdir()} == {"cat.png", "it.png", *made}


def test_a_decode_in_strips(models, device):
    latents = torch.randn(1, 4, 40, 9, generator=torch.Generator().manual_seed(0))
    expected = models[0].decoder(latents)
    with accelerator(device):
        picture = InStrips(models[1].decoder)(latents.to(device)).cpu()
    torch.testing.assert_close(picture, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["mps:0"], indirect=True)  # it refuses more than CUDA
def test_training(device, tmp_path, monkeypatch):
    """Every stage trains and shows samples, the last one is resumed, and the checkpoint works on a CPU."""
    monkeypatch.setattr(stages, "denoise", lambda *args, **kwargs: islice(pipeline.denoise(*args, **kwargs), 2))
    with accelerator(device):
        run = stages.TrainingRun(tmp_path, scenes=16, device=device, config=FEW_LAYERS)
        for name in ("vae", "text", "decoder", "diffusion"):
            run.train(name, minutes=1, steps=1)
        state = load_state(tmp_path / "diffusion.state")
        torch.save({**state, "total": 2}, tmp_path / "diffusion.state")  # as if it had been stopped halfway
        run.train("diffusion", minutes=1)
        path = run.write_checkpoint()
    assert load_state(tmp_path / "diffusion.state")["step"] == 2
    assert generate("a cat", models=load_models(path, "cpu"), **QUICK).shape == (40, 32, 3)


def test_this_accelerator_refuses_what_the_real_ones_refuse(device):
    with accelerator(device):
        there, here = torch.ones(2, device=device), torch.ones(2)
        assert there.device == torch.device(device)
        assert (there + torch.tensor(1.0)).tolist() == [2, 2]
        with pytest.raises(AssertionError, match="aten.add.Tensor on tensors of two devices"):
            there + here
        with pytest.raises(AssertionError, match="two devices"):
            nn.Linear(2, 2)(there)
        with pytest.raises(AssertionError, match="by the CPU's generator"):
            torch.randn(2, device=device, generator=torch.Generator())
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
        if device == "mps:0":
            with pytest.raises(AssertionError, match="MPS has no float64"):
                there.double()
    with pytest.raises(AssertionError, match="outside of the block"):
        there + there
