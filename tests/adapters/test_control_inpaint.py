"""ControlNets that fill the transparent parts of their image, such as control_v11p_sd15_inpaint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate
from sd.adapters.control import Control, Steering
from sd.adapters.controlnet_files import ends_in, load_controlnet
from sd.checkpoints.files import write_checkpoint
from sd.request import Request
from tests.support.control import cldm_state, random_controlnet
from tests.support.synthetic import MICRO, random_models

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
OPTIONS = {"seed": 5, "n_inference_steps": 2, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def net():
    network = random_controlnet(MICRO.unet)
    network.inpaints = True
    return network


def mask_image():
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 16, 48, 64))
    mask.paste(100, (0, 0, 64, 8))  # less than half
    return mask


def erased(picture=PICTURE, mask=None):
    """The picture, transparent where the mask is white."""
    picture = picture.copy()
    picture.putalpha((mask or mask_image()).point(lambda level: 255 - level))
    return picture


def make_inpaint_condition(image, mask):
    """From the documentation of diffusers, docs/source/en/using-diffusers/inpaint.md."""
    image = np.array(image.convert("RGB")).astype(np.float32) / 255.0
    mask = np.array(mask.convert("L")).astype(np.float32) / 255.0
    image[mask > 0.5] = -1.0  # set as masked pixel
    return torch.from_numpy(image[None].transpose(0, 3, 1, 2))


def hints(control, region=None, height=8, width=8):
    """What the ControlNet's convolutions get for the image."""
    seen = []
    hook = control.net.hint.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Steering([control], torch.zeros(1, 4, height, width), region)
    hook.remove()
    return seen[0]


def test_the_hint_is_that_of_diffusers(net):
    hard = mask_image().point(lambda level: 255 * (level > 127))
    torch.testing.assert_close(hints(Control(net, erased(mask=hard))), make_inpaint_condition(PICTURE, hard))
    soft = hints(Control(net, erased()))
    assert torch.equal(soft == -1, make_inpaint_condition(PICTURE, mask_image()) == -1)


def test_pictures_are_those_of_diffusers(net):
    pytest.importorskip("tests.parity.reference")
    import diffusers

    from tests.parity.test_control_parity import OPTIONS, ours_options, with_control
    from tests.parity.test_pipeline_parity import NEGATIVE, PLAIN_PROMPT, assert_same_pictures, generators

    models, mask = random_models(MICRO, seed=3), mask_image().point(lambda level: 255 * (level > 127))
    pipe = with_control(diffusers.StableDiffusionControlNetPipeline, models, [net])
    condition = make_inpaint_condition(PICTURE, mask)
    expected = pipe(PLAIN_PROMPT, condition, height=64, width=64, generator=generators(11, 1), **OPTIONS).images[0]
    control = [Control(net, erased(mask=mask))]
    actual = generate(PLAIN_PROMPT, NEGATIVE, height=64, width=64, control=control, **ours_options(models, 11))
    assert_same_pictures(actual, expected)


def test_no_colour_is_mixed_with_the_mask(net):
    """Where sizes differ, the hint is -1 or a colour of the picture."""
    grey = Image.new("RGB", (160, 144), (51, 51, 51))
    seen = hints(Control(net, erased(grey, mask_image().resize((160, 144)))), height=9, width=10)
    assert seen.shape == (1, 3, 72, 80)
    assert (seen[seen != -1] - 0.2).abs().max() < 0.01
    assert 0.4 < (seen == -1).float().mean() < 0.6


def test_the_part_of_an_image_that_is_repainted(net):
    models, mask = random_models(MICRO), Image.new("L", (64, 64))
    mask.paste(255, (8, 16, 40, 48))
    options = {"input_image": PICTURE, "mask_image": mask, "padding_mask_crop": 0, **OPTIONS}
    picture, elsewhere = erased(mask=mask), erased(mask=mask)
    elsewhere.paste((0, 0, 0, 255), (50, 0, 64, 64))  # outside the part
    results = [generate("a", models=models, control=[Control(net, each)], **options) for each in (picture, elsewhere)]
    assert np.array_equal(*results)
    assert not np.array_equal(results[0], generate("a", models=models, **options))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("control_v11p_sd15_inpaint.pth", True),
        ("a/control_v11p_sd15_inpaint_fp16.safetensors", True),
        ("lllyasviel/control_v11p_sd15_inpaint", True),
        ("lllyasviel/control_v11p_sd15_inpaint@main", True),
        ("lllyasviel/ControlNet-v1-1:control_v11p_sd15_inpaint.pth", True),
        ("a/control_v11p_sd15_inpaint/diffusion_pytorch_model.fp16.safetensors", True),
        ("control_v11p_sd15_inpaint.fp16.safetensors", True),
        ("a_inpaint/control_v11p_sd15_canny.pth", False),
        ("control_sd15_inpaint_depth_hand_fp16.safetensors", False),
        ("inpaint.pth", False),
    ],
)
def test_names(name, expected):
    assert ends_in("inpaint", name) is expected
    assert Control(name, PICTURE).inpaints is expected


def test_a_file_with_this_name(tmp_path, net):
    path = tmp_path / "my_inpaint.safetensors"
    write_checkpoint(path, cldm_state(net))
    models = random_models(MICRO)
    loaded = load_controlnet(path, models)
    assert loaded.inpaints
    image = generate("a", models=models, control=[Control(path, erased())], **OPTIONS)
    erased().save(tmp_path / "erased.png")
    with open(tmp_path / "erased.png", "rb") as file:
        for source in (tmp_path / "erased.png", file, np.asarray(erased())):
            assert np.array_equal(generate("a", models=models, control=[Control(loaded, source)], **OPTIONS), image)


def test_an_image_without_transparent_parts(tmp_path, net):
    """Before any work, and by the name of the file."""
    (tmp_path / "my_inpaint.pth").touch()
    faint = erased(mask=Image.new("L", (64, 64), 100))
    for own, name in ((tmp_path / "my_inpaint.pth", "my_inpaint.pth"), (net, "ControlNet")):
        for image in (PICTURE, faint):
            with pytest.raises(ValueError, match=f"^control.image should be transparent where {name} fills it: erase"):
                Request("a", control=[Control(own, image)]).read_images()
    with pytest.raises(FileNotFoundError, match=r"^There is no file .*none\.png"):
        Control(net, tmp_path / "none.png").read()


def test_reading_twice_changes_nothing(net):
    once = Control(net, erased()).read()
    assert once.image.mode == "RGBA"
    assert np.array_equal(once.read().image.getchannel("A"), once.image.getchannel("A"))
    assert torch.equal(hints(once), hints(Control(net, erased())))
    assert replace(once, net=random_controlnet(MICRO.unet)).read().image.mode == "RGB"


def test_a_request_travels_as_json(net, tmp_path):
    net.source = tmp_path
    request = Request("a", control=[Control(net, erased())]).read_images()
    back = Request.from_dict(json.loads(json.dumps(request.to_dict()))).control[0]
    assert torch.equal(hints(replace(back, net=net)), hints(request.control[0]))
    with pytest.raises(ValueError, match="^control.image is not an image that can be read"):
        Request.from_dict({"prompt": "a", "control": [{"net": "a", "image": "data:image/png;base64,AAAA"}]})
