"""Painting into a picture, with the ordinary and with the inpainting U-Net."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate, pipeline
from sd.images import read_mask
from sd.inpainting import without_masked
from tests.support.synthetic import INPAINTING_MICRO, MICRO, random_models

QUICK = {"n_inference_steps": 3, "height": 32, "width": 48, "seed": 1}


@pytest.fixture(scope="module", params=[MICRO, INPAINTING_MICRO], ids=["ordinary", "inpainting"])
def models(request):
    return random_models(request.param)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def half_mask(mode="L"):
    mask = Image.new("L", (48, 32))
    mask.paste(255, (20, 0, 48, 32))
    return mask.convert(mode)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("feather", [0, 6])
def test_black_comes_back_to_the_byte_and_white_is_painted(models, picture, feather, strength):
    image = generate("a cat", "", picture, half_mask(), strength, models=models, feather=feather, **QUICK)
    original = np.asarray(picture)
    assert image.shape == original.shape
    assert np.array_equal(image[:, :20], original[:, :20])
    assert np.abs(image[:, 30:].astype(int) - original[:, 30:]).mean() > 20


def test_grey_blends(models, picture):
    painted = generate("a cat", "", picture, Image.new("L", (48, 32), 255), models=models, **QUICK)
    blended = generate("a cat", "", picture, Image.new("L", (48, 32), 102), models=models, **QUICK)
    if not models.config.unet.inpaints:  # to the other U-Net grey is a different mask, so it paints something else
        expected = 0.4 * painted + 0.6 * np.asarray(picture)
        assert np.abs(blended - expected).max() <= 0.5 + 1e-3


def test_several_pictures_are_those_of_their_seeds(models, picture):
    together = generate(["a cat", "a dog"], "", picture, half_mask(), models=models, **QUICK)
    alone = generate("a dog", "", picture, half_mask(), models=models, **(QUICK | {"seed": 2}))
    assert np.abs(together[1].astype(int) - alone).max() <= 1


def test_the_known_region_is_at_every_noise_level(picture):
    models = random_models(MICRO)
    generators = pipeline.make_generators(0, 1)
    sampler = pipeline.SAMPLERS["ddpm"](generators)
    sampler.set_inference_timesteps(4)
    known = pipeline.get_inpainting_inputs(models, 1, 32, 48, generators, picture, half_mask())
    context = pipeline.encode_prompt(models, "a cat")
    latents = known.start(sampler, 1.0)
    assert torch.equal(latents, known.noise)
    steps = list(pipeline.denoise(models, latents, context, sampler, inpainting=known))
    for step, timestep in zip(steps, sampler.timesteps[1:]):
        expected = sampler.add_noise(known.latents, timestep, known.noise)
        # Columns 0 and 1 have only black pixels; the edge at pixel 20 lies in column 2.
        assert torch.equal(step.latents[..., :2], expected[..., :2])
        assert not torch.isclose(step.latents[..., 2:], expected[..., 2:]).any(dim=-1).all()
    assert torch.equal(steps[-1].latents[..., :2], known.latents[..., :2])


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
def test_masks_of_any_mode(mode):
    mask = half_mask() if mode != "I;16" else Image.fromarray(np.asarray(half_mask()).astype(np.uint16) * 257)
    mask = mask if mode == "I;16" else mask.convert(mode)
    white = read_mask(mask, 32, 48)
    assert white.shape == (1, 1, 32, 48)
    assert white.unique().tolist() == [0, 1]
    assert white[0, 0, :, 20:].min() == 1
    assert white[0, 0, :, :20].max() == 0


def test_a_mask_of_another_size_keeps_pure_black_and_white():
    white = read_mask(half_mask().resize((480, 320), Image.Resampling.NEAREST), 32, 48)
    assert white[..., :18].max() == 0
    assert white[..., 23:].min() == 1


@pytest.mark.parametrize("side, size", [(32, 128), (64, 512), (256, 128), (1000, 512)])
def test_resizing_a_mask_does_not_ring(side, size):
    """One pixel of the mask beside its edge may be grey, and none beyond it."""
    mask = np.zeros((side, side), np.uint8)
    inner, most = slice(side // 4, 3 * side // 4), max(1, side / size)
    mask[inner, inner] = 255
    resized = read_mask(mask, size, size)[0, 0].numpy()
    place = (np.arange(size) + 0.5) * side / size  # of each pixel's centre, in pixels of the mask
    inside = (place > inner.start + most) & (place < inner.stop - most)
    outside = (place < inner.start - most) | (place > inner.stop + most)
    assert resized[outside].max() == resized[:, outside].max() == 0
    assert resized[np.ix_(inside, inside)].min() == 1


def test_strokes_on_an_empty_layer_are_all_that_is_painted(models, picture):
    layer = Image.new("RGBA", (48, 32), (255, 255, 255, 0))  # white, but not there
    layer.paste((255, 255, 255, 255), (20, 0, 48, 32))
    assert torch.equal(read_mask(layer, 32, 48), read_mask(half_mask(), 32, 48))
    expected = generate("a cat", "", picture, half_mask(), models=models, **QUICK)
    assert np.array_equal(generate("a cat", "", picture, layer, models=models, **QUICK), expected)


def test_a_mask_may_be_an_array_of_levels():
    assert torch.equal(read_mask(np.array(half_mask()), 32, 48), read_mask(half_mask(), 32, 48))


def test_a_mask_has_the_shape_of_its_picture(models, picture):
    with pytest.raises(
        ValueError, match="mask_image should have the shape of input_image, 48 x 32, not 32 x 32 pixels"
    ):
        generate("a cat", "", picture, half_mask().crop((0, 0, 32, 32)), models=models, **QUICK)
    for size in ((96, 64), (24, 16), (100, 67)):
        generate("a cat", "", picture, half_mask().resize(size), models=models, **QUICK)


def test_feathering_softens_inwards():
    sharp, soft = read_mask(half_mask(), 32, 48), read_mask(half_mask(), 32, 48, feather=8)
    row = soft[0, 0, 16]
    assert row[:20].max() == 0
    assert (row[20:].diff() >= 0).all()
    assert 0 < row[22] < 0.9
    assert row[40] == 1
    assert (soft <= sharp).all()


def test_without_masked_is_grey_where_it_is_painted():
    picture = torch.rand(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    seen = without_masked(picture, mask)
    assert torch.equal(seen[..., :4], picture[..., :4])
    assert (seen[..., 4:] == 0).all()


def test_the_inpainting_unet_draws_without_a_picture_too():
    models = random_models(INPAINTING_MICRO)
    assert generate("a cat", models=models, **QUICK).std() > 10
    context, sampler = pipeline.encode_prompt(models, "a cat"), pipeline.SAMPLERS["ddpm"]()
    with pytest.raises(ValueError, match="inpainting should be what `get_inpainting_inputs` returns"):
        next(pipeline.denoise(models, pipeline.get_latents(models), context, sampler))


def test_bad_input(models, picture):
    with pytest.raises(ValueError, match="input_image should be given with mask_image"):
        generate("a cat", mask_image=half_mask(), models=models)
    with pytest.raises(ValueError, match="feather should be a number of pixels, 0 or more, not -1"):
        generate("a cat", "", picture, half_mask(), models=models, feather=-1)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        generate("a cat", "", picture, "none.png", models=models)
