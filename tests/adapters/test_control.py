"""What ControlNets do in `generate`: with every sampler, guidance, deep caches, tracers and odd arguments."""

import json
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate, model_loader, pipeline
from sd.adapters.control import MAX_CONTROLS, Control, Steering
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import write_checkpoint
from sd.inside.tracer import Tracer
from sd.request import Request
from sd.runtime.deep_cache import DeepCache
from sd.samplers import SAMPLERS
from tests.support.control import cldm_state, random_controlnet
from tests.support.marks import slow
from tests.support.synthetic import INPAINTING_MICRO, MICRO, SD2_MICRO, random_models

SIZE = {"height": 32, "width": 40}
OPTIONS = {"seed": 5, "n_inference_steps": 2, **SIZE}
HINT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.fixture(scope="module")
def net():
    return random_controlnet(MICRO.unet)


def draw(models, *control, **more):
    return generate("a cat", "a dog", models=models, control=list(control) or None, **OPTIONS | more)


def test_it_changes_the_picture_and_its_strength_how_much(models, net):
    plain = draw(models).astype(int)
    changes = [np.abs(draw(models, Control(net, HINT, strength)) - plain).mean() for strength in (0, 0.2, 1)]
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2]


@pytest.mark.parametrize("strength", [Fraction(1, 2), np.float16(0.5), np.float64(0.5)])
def test_its_strength_can_be_any_number(models, net, strength):
    half, other = (draw(models, Control(net, HINT, each)) for each in (0.5, strength))
    assert np.array_equal(half, other)


def test_before_training_it_changes_nothing(models, net):
    fresh = random_controlnet(MICRO.unet)
    for layer in (*fresh.zero_convs, fresh.zero_middle):
        layer.weight.zero_()
        layer.bias.zero_()
    assert np.array_equal(draw(models, Control(fresh, HINT)), draw(models))


@pytest.mark.parametrize("name", [name if name == "heun" else slow(name) for name in SAMPLERS])
def test_every_sampler(models, net, name):
    options = {"sampler_name": name, "n_inference_steps": 2}
    assert not np.array_equal(draw(models, Control(net, HINT), **options), draw(models, **options))


def test_what_ends_early_leaves_no_trace(models, net):
    """The next image is the same as before, and a control that never works is none."""
    plain = draw(models)
    never = Control(net, HINT, start=0.6, end=0.9)  # no whole step of two lies between
    draw(models, Control(net, HINT, end=0.5))
    with pytest.warns(UserWarning, match="control has no effect: no step of 2 lies between 0.6 and 0.9 of the run"):
        assert np.array_equal(draw(models, never), plain)
    assert np.array_equal(draw(models), plain)


@pytest.mark.parametrize(
    "start, end, steps, working",
    [
        (0, 1, 4, [0, 1, 2, 3]),
        (0.25, 1, 4, [1, 2, 3]),
        (0.3, 1, 4, [2, 3]),
        (0, 0.7, 4, [0, 1]),
        (0.2, 0.6, 10, [2, 3, 4, 5]),
        (0.5, 1, 1, []),
    ],
)
def test_start_and_end_are_shares_of_the_steps(start, end, steps, working):
    control = Control("x", HINT, start=start, end=end)
    assert [step for step in range(steps) if control.works(step, steps)] == working


def test_several_add_up(models, net):
    latents, context = torch.randn(2, 4, 4, 5), torch.randn(2, 77, 32)
    arguments = latents, context, torch.tensor([500, 500]), 0, 2, True
    other = random_controlnet(MICRO.unet, seed=7)
    controls = [Control(net, HINT, 0.5), Control(other, HINT, 2)]
    both = Steering(controls, latents).residuals(*arguments)
    single = [Steering([one], latents).residuals(*arguments) for one in controls]
    for total, *parts in zip(both, *single):
        torch.testing.assert_close(total, sum(parts))


def test_guess_mode_leaves_the_unconditional_half_alone(net):
    latents, context = torch.randn(4, 4, 4, 5), torch.randn(4, 77, 32)
    times = torch.full((4,), 300)
    (plain, guess) = (Steering([Control(net, HINT, 2, guess_mode=on)], latents) for on in (False, True))
    expected = plain.residuals(latents, context, times, 0, 1, guided=True)
    residuals = guess.residuals(latents, context, times, 0, 1, guided=True)
    for i, (actual, full) in enumerate(zip(residuals, expected)):
        assert not actual[:2].any()
        torch.testing.assert_close(actual[2:], full[2:] * 10 ** (i / 12 - 1), rtol=1e-4, atol=1e-4)
    without = guess.residuals(latents[2:], context[2:], times[2:], 0, 1, guided=False)
    torch.testing.assert_close(without[5], residuals[5][2:], rtol=1e-4, atol=1e-4)


def test_guidance_in_a_part_of_the_run(models, net):
    """Half of a batch ends with guidance, and so does the half of the residuals."""
    request = Request("a cat", seed=5, n_inference_steps=3, **SIZE)
    context = pipeline.encode_prompt(models, "a cat", "")
    sampler, latents, _ = pipeline.prepare(models, request)
    control = [Control(net, HINT, guess_mode=True)]
    steps = list(pipeline.denoise(models, latents, context, sampler, 5.0, cfg_interval=(0, 0.5), control=control))
    assert [step.noise_uncond is None for step in steps] == [False, False, True]


def test_long_prompts_and_batches(models, net):
    control = [Control(net, HINT)]
    prompts = ["a cat, " * 60, "a dog"]
    both = generate(prompts, models=models, control=control, **OPTIONS)
    alone = generate(prompts[1], models=models, control=control, **OPTIONS | {"seed": 6})
    assert both.shape == (2, 32, 40, 3)
    assert np.abs(both[1].astype(int) - alone).max() <= 1


def test_greyscale_transparency_and_shape_of_the_image(models, net):
    grey = HINT.convert("L")
    as_colour = draw(models, Control(net, grey.convert("RGB")))
    assert np.array_equal(draw(models, Control(net, grey)), as_colour)
    assert np.array_equal(draw(models, Control(net, np.asarray(grey))), as_colour)
    layer = Image.new("RGBA", (40, 32))
    layer.paste((255, 255, 255, 255), (8, 8, 30, 20))
    flat = Image.new("RGB", (40, 32))
    flat.paste("white", (8, 8, 30, 20))
    assert np.array_equal(draw(models, Control(net, layer)), draw(models, Control(net, flat)))
    wide = Image.new("RGB", (80, 32), "red")
    wide.paste(HINT, (20, 0))
    assert np.array_equal(draw(models, Control(net, wide)), draw(models, Control(net, HINT)))  # cropped, not stretched


def test_the_hint_is_from_0_to_1(net):
    seen = []
    hook = net.hint.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Steering([Control(net, Image.new("RGB", (40, 32), (255, 0, 51)))], torch.zeros(1, 4, 4, 5))
    hook.remove()
    assert seen[0].shape == (1, 3, 32, 40)
    torch.testing.assert_close(seen[0][0, :, 3, 4], torch.tensor([1, 0, 0.2]))


@pytest.mark.parametrize("config", [slow(MICRO), INPAINTING_MICRO])
def test_inpainting_and_only_the_masked_part(config, net):
    models = random_models(config)
    picture = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 16:40] = 255
    options = {"input_image": picture, "mask_image": mask, "padding_mask_crop": 4, "strength": 1}
    whole = Image.fromarray(np.roll(picture, 9, axis=1))
    elsewhere = np.array(whole)
    elsewhere[40:] = 0  # outside the part that is repainted
    results = [draw(models, *each, **options) for each in ([], [Control(net, whole)], [Control(net, elsewhere)])]
    assert all(result.shape == picture.shape for result in results)
    assert not np.array_equal(results[0], results[1])
    assert np.array_equal(results[1], results[2])


def test_deep_cache(models, net):
    """With the same latents, the kept map and the first residual give the same noise as the whole U-Net."""
    inputs = torch.randn(2, 4, 4, 5), torch.randn(2, 77, 32), torch.tensor([500, 500])
    residuals = Steering([Control(net, HINT)], inputs[0]).residuals(*inputs, 0, 1, False)
    cached = DeepCache(models.diffusion, 2)
    noise = models.diffusion(*inputs, residuals)
    assert torch.equal(cached(*inputs, residuals), noise)
    assert torch.equal(cached(*inputs, residuals), noise)  # from the kept map
    cached(*inputs, residuals)
    torch.testing.assert_close(cached(*inputs), models.diffusion(*inputs))  # starts anew when control ends
    image = draw(models, Control(net, HINT, end=0.5), deep_cache=2, n_inference_steps=4)
    assert image.shape == (32, 40, 3)


def test_a_tracer_changes_nothing(models, net):
    plain = draw(models, Control(net, HINT))
    with Tracer(models, attention=True) as trace:
        assert np.array_equal(draw(models, Control(net, HINT)), plain)
    assert trace.shapes("diffusion")[0] == ("in", (2, 4, 4, 5))


@pytest.mark.slow
def test_compiled(net):
    models = random_models(MICRO)
    expected = draw(models, Control(net, HINT, end=0.5))
    models.diffusion.compile(dynamic=False, backend="aot_eager")  # traced, but not made into machine code
    actual = draw(models, Control(net, HINT, end=0.5))
    assert np.abs(actual.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [slow(torch.float16), torch.bfloat16])
def test_half_precision(dtype, net):
    models = random_models(MICRO)
    expected = draw(models, Control(net, HINT)).astype(int)
    for network in (models.clip, models.encoder, models.diffusion, models.decoder):
        network.to(dtype)
    own = random_controlnet(MICRO.unet).to(dtype)
    halves = [draw(models, Control(each, HINT)) for each in (own, net)]  # one of another dtype than the models, too
    assert all(np.abs(half - expected).mean() < 4 for half in halves)


def test_networks_move_where_they_are_needed(models, net, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to, **_: moved.append((type(self).__name__, to)) or self)
    draw(models, Control(net, HINT), idle_device="cpu")
    assert sum(name == "ModuleList" for name, _ in moved) == 2  # to the device, and back


@pytest.mark.parametrize("name", ["down.2.0.conv1.weight", "zero_convs.3.bias", "zero_middle.weight", "hint.0.weight"])
def test_a_controlnet_without_numbers_is_named(models, name):
    net = random_controlnet(MICRO.unet)
    net.get_parameter(name).flatten()[0] = torch.nan
    with pytest.raises(ValueError, match=rf"^The ControlNet cannot be used: {re.escape(name)} holds NaN"):
        draw(models, Control(net, HINT))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"net": 3}, "control.net should be what load_controlnet returns, or a path, not 3."),
        ({"image": 3}, "control.image should be a path, an open file, a PIL image or an array, not 3."),
        ({"image": np.zeros((4, 4, 2), np.uint8)}, "control.image should be an array"),
        ({"strength": -1}, "control.strength should be a number from 0 to 10, not -1."),
        ({"strength": float("nan")}, "control.strength should be a number from 0 to 10, not nan."),
        ({"strength": True}, "control.strength should be a number from 0 to 10, not True."),
        ({"start": 1.5}, "control.start should be a number from 0 to 1, not 1.5."),
        ({"end": "1"}, "control.end should be a number from 0 to 1, not '1'."),
        ({"start": 0.5, "end": 0.5}, "control.start should be less than the end, 0.5, not 0.5."),
        ({"guess_mode": 1}, "control.guess_mode should be True or False, not 1."),
    ],
)
def test_bad_settings_are_named_before_any_work(monkeypatch, net, change, message):
    monkeypatch.setattr(model_loader, "load_models", lambda **_: pytest.fail("loaded before checking"))
    with pytest.raises(ValueError, match="should be") as error:
        generate("a cat", control=[replace(Control(net, HINT), **change)])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "control, what",
    [
        (3, "int"),
        ("net.pth", "str"),
        ([3], "1 of type int"),
        ({"net": 1}, "dict"),
        ([None, 3, None], "3 of type NoneType and int"),
        (Control("net", HINT), "Control"),
        ([(torch.nn.Linear(1, 1), HINT)], "1 of type tuple"),
    ],
)
def test_other_things_are_no_list_of_controls(monkeypatch, control, what):
    monkeypatch.setattr(model_loader, "load_models", lambda **_: pytest.fail("loaded before checking"))
    with pytest.raises(
        ValueError, match=rf"^control should be a list of at most 10 Control\(net, image\), not {what}\.$"
    ):
        generate("a cat", control=control)


def test_too_many_controls(net):
    with pytest.raises(ValueError, match="^control should be a list of at most 10.*, not 11 of type Control"):
        Request("a cat", control=[Control(net, HINT)] * (MAX_CONTROLS + 1)).check()


def test_missing_files_are_named_before_any_work(monkeypatch, net, tmp_path):
    monkeypatch.setattr(model_loader, "load_models", lambda **_: pytest.fail("loaded before checking"))
    with pytest.raises(FileNotFoundError, match=r"^There is no ControlNet at .*none.pth: give a file or a folder"):
        generate("a cat", control=[Control(tmp_path / "none.pth", HINT)])
    with pytest.raises(FileNotFoundError, match=r"^There is no file .*none.png"):
        generate("a cat", control=[Control(net, tmp_path / "none.png")])


def test_another_family_is_refused_before_any_work(monkeypatch, net):
    models = random_models(replace(SD2_MICRO, unet=replace(SD2_MICRO.unet, context_width=48)))
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *_: pytest.fail("worked before checking"))
    with pytest.raises(
        CheckpointError, match=r"one for a model \(context of 48\), like the model, not for a model \(context of 32\)\."
    ):
        draw(models, Control(net, HINT))


def test_a_request_travels_as_json_with_the_path(models, tmp_path):
    path = tmp_path / "net.safetensors"
    write_checkpoint(path, cldm_state(random_controlnet(MICRO.unet)))
    request = Request("a cat", seed=5, control=[Control(path, HINT, np.float32(0.5), end=0.5, guess_mode=True)])
    text = json.dumps(request.to_dict())
    back = Request.from_dict(json.loads(text))
    back.check()
    assert back.to_dict() == request.to_dict()
    assert back.control[0].net == str(path)
    small = [replace(each, n_inference_steps=2, **SIZE) for each in (request, back)]
    images = [pipeline.draw(each, models) for each in small]
    assert np.array_equal(*images)
    loaded = replace(request, control=[request.control[0].loaded(models)])
    assert loaded.to_dict() == request.to_dict()


def test_a_controlnet_of_no_file_cannot_travel(net):
    with pytest.raises(ValueError, match="^control.net should be loaded from a file"):
        Request("a cat", control=[Control(net, HINT)]).to_dict()


@pytest.mark.parametrize(
    "control",
    [3, [3], [{}], [{"net": "a"}], [{"net": "a", "image": "b", "colour": 1}], [{"net": 3, "image": "b"}], {"net": 1}],
)
def test_controls_from_json_are_checked(control):
    with pytest.raises(ValueError, match="^control should be a list of dicts of "):
        Request.from_dict({"prompt": "a cat", "control": control})
    with pytest.raises(ValueError, match="^control.image should be a text that begins with"):
        Request.from_dict({"prompt": "a cat", "control": [{"net": "a", "image": "/etc/passwd"}]})
