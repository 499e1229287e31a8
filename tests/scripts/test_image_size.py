"""The size of an image that starts from another: its own shape, and about the model's own number of pixels."""

import pytest

from scripts.support.image_size import choose_size


@pytest.mark.parametrize(
    "image, side, size",
    [
        (None, 512, (512, 512)),
        ((3000, 2000), 512, (624, 416)),
        ((2000, 3000), 512, (416, 624)),
        ((700, 700), 512, (512, 512)),
        ((3000, 2000), 128, (160, 104)),
        ((1, 10000), 512, (128, 2048)),
    ],
)
def test_neither_is_given(image, side, size):
    assert choose_size(image, None, None, side) == size


@pytest.mark.parametrize("image", [(1920, 1080), (641, 427), (4000, 3000), (500, 700), (99, 100), (2560, 1080)])
@pytest.mark.parametrize("side", [128, 512])
def test_little_is_cropped_and_the_area_is_the_models(image, side):
    width, height = choose_size(image, None, None, side)
    assert width % 8 == height % 8 == 0
    kept = width / height / (image[0] / image[1])
    assert min(kept, 1 / kept) > 0.97
    assert 0.85 < width * height / side**2 < 1.15


@pytest.mark.parametrize(
    "width, height, size",
    [(96, None, (96, 64)), (None, 64, (96, 64)), (96, 96, (96, 96)), (8192, None, (8192, 5464)), (8, None, (8, 8))],
)
def test_what_is_given_counts(width, height, size):
    assert choose_size((300, 200), width, height, 512) == size


def test_without_an_image_the_other_side_is_the_models_own():
    assert choose_size(None, 96, None, 512) == (96, 512)
    assert choose_size((10, 10_000), 800, None, 512) == (800, 8192)
