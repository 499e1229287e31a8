"""Painting into a picture, with the ordinary and with the inpainting U-Net."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sd import generate, load_models, pipeline
from sd.images import alpha_mask, read_mask
from sd.inpainting import around_mask, get_inpainting_inputs, mask_channels, without_masked
from sd.request import Request
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


@pytest.mark.filterwarnings("ignore:mask_image is")
@pytest.mark.parametrize("black, white", [(0, 255), (127, 255), (0, 127)])
def test_one_level_of_the_mask_changes_the_image_by_a_few_levels(models, picture, black, white):
    def painted(black: int, white: int) -> np.ndarray:
        mask = half_mask().point(lambda level: white if level else black)
        image = generate("a cat", "", picture, mask, 1.0, models=models, **(QUICK | {"n_inference_steps": 6}))
        return image.astype(int)

    image = painted(black, white)
    assert np.abs(painted(black + 1, white) - image).max() <= 8
    assert np.abs(painted(black, white - 1) - image).max() <= 8
    assert np.abs(painted(black, white - 100) - image).max() > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mask_image is")
def test_what_surrounds_a_nearly_black_mask_still_counts():
    """A scan's black is 1 or 2 of 255. What is painted must depend on the image beside it as with a clean mask."""
    models = load_models(device="cpu", dtype=torch.float32)
    pictures = [np.full((128, 128, 3), level, np.uint8) for level in (20, 230)]

    def difference(black: int) -> float:
        mask = Image.new("L", (128, 128), black)
        mask.paste(255, (64, 0, 128, 128))
        settings = {"models": models, "seed": 1, "n_inference_steps": 6}
        images = [generate("a red house", "", each, mask, 1.0, **settings).astype(int) for each in pictures]
        return np.abs(images[0] - images[1])[:, 64:].mean()

    clean = difference(0)
    assert clean > 30
    assert difference(2) == pytest.approx(clean, rel=0.02)


def test_grey_is_repainted_during_the_last_part_of_the_run(picture):
    """2306.00950: under a mask of m, the image is held until a share m of the steps is left."""
    models = random_models(MICRO)
    generators = pipeline.make_generators(0, 1)
    sampler = pipeline.SAMPLERS["ddpm"](generators)
    sampler.set_inference_timesteps(10)
    mask = Image.new("L", (48, 32), 102)  # 0.4
    inpainting = get_inpainting_inputs(models, 1, 32, 48, generators, picture, mask)
    latents = torch.randn(1, 4, 4, 6)
    for step in range(1, 11):
        restored = inpainting.restore_known(latents, sampler, step)
        known = inpainting.latents
        if step < 10:
            known = sampler.add_noise(known, sampler.timesteps[step], inpainting.noise)
        torch.testing.assert_close(restored, known if step <= 6 else latents)


def strokes(draw):
    mask = Image.new("L", (128, 128))
    draw(ImageDraw.Draw(mask))
    return mask


@pytest.mark.parametrize(
    "draw",
    [
        lambda pen: pen.rectangle([0, 3, 127, 5], fill=255),
        lambda pen: pen.rectangle([51, 0, 54, 127], fill=255),
        lambda pen: pen.rectangle([41, 41, 46, 46], fill=255),
        lambda pen: pen.line([(5, 5), (60, 30), (20, 90), (120, 110)], fill=255, width=1),
        lambda pen: pen.line([(0, 127), (127, 0)], fill=90, width=3),
    ],
)
def test_the_inpainting_unets_mask_covers_every_latent_with_a_repainted_pixel(draw):
    mask = read_mask(strokes(draw), 128, 128)
    small = mask_channels(mask, torch.zeros(2, 4, 16, 16))[:, :1]
    brightest = mask.reshape(16, 8, 16, 8).amax((1, 3))
    assert torch.equal(small, brightest.expand(2, 1, 16, 16))
    grey = without_masked(torch.ones(1, 3, 128, 128), mask) < 1
    assert torch.equal(grey.any(1)[0].reshape(16, 8, 16, 8).any(3).any(1), small[0, 0] > 0)


@pytest.mark.parametrize(
    "mask, problem",
    [
        (Image.new("L", (48, 32)), "black everywhere"),
        (Image.new("RGBA", (48, 32)), "black everywhere"),  # black strokes on a transparent layer look the same
        (half_mask().point(lambda level: level > 127 and 1), "nearly black, 1 of 255 at most"),
        (np.asarray(half_mask()) // 255, "nearly black, 1 of 255 at most"),
        (Image.new("L", (48, 32), 255), "white on 100% of the image, so nearly all is repainted: invert the mask"),
    ],
)
def test_a_mask_that_does_next_to_nothing_is_explained(picture, mask, problem):
    with pytest.warns(UserWarning, match=f"^mask_image is {problem}.* should change.$") as caught:
        Request("a cat", input_image=picture, mask_image=mask).read_images()
    assert len(caught) == 1


@pytest.mark.parametrize("mask", [half_mask(), half_mask().point(lambda level: 255 - level)])
def test_a_usual_mask_is_not_commented_on(picture, mask, recwarn):
    Request("a cat", input_image=picture, mask_image=mask).read_images()
    assert not recwarn.list


@pytest.mark.parametrize("level", [3, 85, 127, 254])
def test_grey_strokes_are_feathered_as_white_ones_are(level):
    masks = [strokes(lambda pen, fill=fill: pen.rectangle([20, 20, 99, 99], fill=fill)) for fill in (level, 255)]
    grey, white = (read_mask(mask, 128, 128, 8) for mask in masks)
    assert torch.allclose(grey, white * level / 255, atol=1e-3)
    assert grey.max() == pytest.approx(level / 255, abs=1e-6)


def test_a_feather_that_leaves_nothing_of_the_mask_is_explained(recwarn):
    mask = strokes(lambda pen: pen.line([(20, 20), (100, 100)], fill=255, width=5))
    assert read_mask(mask, 128, 128, 2).max() > 0.8
    assert not recwarn.list
    with pytest.warns(UserWarning, match="^feather is wider than what is white in mask_image, .* make it smaller.$"):
        assert read_mask(mask, 128, 128, 20).max() < 0.1


def test_alpha_mask_is_white_where_the_image_was_erased(tmp_path):
    erased = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).convert("RGBA")
    erased.putalpha(half_mask().point(lambda level: 255 - level))
    erased.save(tmp_path / "erased.png")
    for source in (erased, np.asarray(erased), tmp_path / "erased.png"):
        assert np.array_equal(alpha_mask(source), half_mask())
    with (tmp_path / "erased.png").open("rb") as file:
        assert np.array_equal(alpha_mask(file), half_mask())
    with pytest.raises(ValueError, match="input_image should have transparent parts"):
        alpha_mask(half_mask())


def test_several_pictures_are_those_of_their_seeds(models, picture):
    together = generate(["a cat", "a dog"], "", picture, half_mask(), models=models, **QUICK)
    alone = generate("a dog", "", picture, half_mask(), models=models, **(QUICK | {"seed": 2}))
    assert np.abs(together[1].astype(int) - alone).max() <= 1


def test_the_known_region_is_at_every_noise_level(picture):
    models = random_models(MICRO)
    generators = pipeline.make_generators(0, 1)
    sampler = pipeline.SAMPLERS["ddpm"](generators)
    sampler.set_inference_timesteps(4)
    known = get_inpainting_inputs(models, 1, 32, 48, generators, picture, half_mask())
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


def photo(height=200, width=300):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def spot(box, height=200, width=300):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def test_only_the_masked_part_is_repainted_and_pasted_back(models):
    image, mask = photo(), spot((120, 60, 150, 100))
    result = generate("a cat", "", image, mask, models=models, padding_mask_crop=16, **QUICK)
    assert result.shape == (200, 300, 3)
    painted = np.asarray(mask) > 0
    assert np.array_equal(result[~painted], np.asarray(image)[~painted])
    assert np.abs(result[painted].astype(int) - np.asarray(image)[painted]).mean() > 20
    several = generate(["a cat", "a dog"], "", image, mask, models=models, padding_mask_crop=16, **QUICK)
    assert several.shape == (2, 200, 300, 3)
    assert np.abs(several[0].astype(int) - result).max() <= 1


def test_a_region_as_large_as_the_image_is_the_usual_inpainting(models, picture):
    settings = QUICK | {"models": models}
    usual = generate("a cat", "", picture, half_mask(), **settings)
    region = generate("a cat", "", picture, half_mask(), padding_mask_crop=1000, **settings)
    assert np.array_equal(region, usual)


@pytest.mark.parametrize(
    "box, padding, size, region, shape",
    [
        ((120, 60, 150, 100), 0, (64, 64), (115, 60, 155, 100), (64, 64)),  # widened to a square
        ((120, 60, 150, 100), 10, (64, 64), (105, 50, 165, 110), (64, 64)),
        ((120, 60, 160, 80), 0, (32, 64), (120, 60, 160, 80), (32, 64)),
        ((0, 190, 30, 200), 0, (64, 64), (0, 170, 30, 200), (64, 64)),  # moved into the image
        ((0, 0, 300, 20), 0, (64, 64), (0, 0, 300, 200), (56, 80)),  # the image is too low for a square
        ((5, 5, 6, 6), 0, (64, 64), (5, 5, 6, 6), (64, 64)),
    ],
)
def test_the_region_around_a_mask(box, padding, size, region, shape):
    models = random_models(MICRO)
    inputs = get_inpainting_inputs(models, 1, *size, 0, photo(), spot(box), padding_mask_crop=padding)
    assert inputs.region.box == region
    assert tuple(inputs.image.shape[2:]) == tuple(inputs.mask.shape[2:]) == shape
    assert tuple(inputs.latents.shape) == (1, 4, shape[0] // 8, shape[1] // 8)


def test_a_scans_black_does_not_enlarge_the_region():
    dirty = spot((120, 60, 150, 100)).point(lambda level: max(level, 3))
    mask = np.asarray(dirty, np.float32) / 255
    assert around_mask(mask, 0, 64, 64) == (115, 60, 155, 100)
    assert around_mask(np.zeros((20, 30)), 0, 64, 64) == (0, 0, 30, 20)


def test_bad_input(models, picture):
    with pytest.raises(ValueError, match="input_image should be given with mask_image"):
        generate("a cat", mask_image=half_mask(), models=models)
    with pytest.raises(ValueError, match="feather should be a number of pixels, 0 or more, not -1"):
        generate("a cat", "", picture, half_mask(), models=models, feather=-1)
    with pytest.raises(ValueError, match="mask_image should be given with padding_mask_crop, not None"):
        generate("a cat", "", picture, models=models, padding_mask_crop=8)
    for padding in (-1, 2.5, True, "8"):
        with pytest.raises(ValueError, match="padding_mask_crop should be a whole number of pixels, 0 to 8192, not"):
            generate("a cat", "", picture, half_mask(), models=models, padding_mask_crop=padding)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        generate("a cat", "", picture, "none.png", models=models)
