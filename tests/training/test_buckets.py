"""Aspect-ratio buckets: NovelAI's published ones, the choice of one by hand, and pictures cropped to it."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd.training.buckets import PicturesOfOneShape, bucket_shapes, nearest, shapes_of_model, sort_into_buckets
from sd.training.captions import DataError

# Width and height of those in the README of NovelAI's repository, without 512 x 512, which is added there by hand.
PUBLISHED = [(256, 1024), (320, 1024), (384, 1024), (384, 960), (384, 896), (448, 832), (512, 768), (512, 704)]
PUBLISHED += [(576, 640), (640, 576), (704, 512), (768, 512), (832, 448), (896, 384), (960, 384), (1024, 384)]
PUBLISHED += [(1024, 320), (1024, 256)]


def test_the_shapes_are_those_that_novelai_published():
    shapes = bucket_shapes(512 * 768, shortest=256, longest=1024, step=64)
    assert sorted(shapes) == sorted((height, width) for width, height in PUBLISHED)


@pytest.mark.parametrize("size, step", [(512, 64), (768, 64), (128, 16), (64, 8)])
def test_the_shapes_of_a_model(size, step):
    shapes = shapes_of_model(size, 8)
    assert (size, size) in shapes
    assert {(width, height) for height, width in shapes} == set(shapes)
    assert all(height * width <= size**2 and height % step == width % step == 0 for height, width in shapes)
    assert max(map(max, shapes)) == 2 * size


@pytest.mark.parametrize(
    "shape, expected",
    [((512, 512), (512, 512)), ((3000, 4000), (448, 576)), ((1080, 1920), (384, 640)), ((4000, 100), (1024, 256))],
)
def test_a_picture_goes_where_least_is_cropped(shape, expected):
    shapes = shapes_of_model(512, 8)

    def kept(other):
        a, b = shape[1] / shape[0], other[1] / other[0]
        return min(a / b, b / a)

    assert nearest(shape, shapes) == expected
    assert kept(expected) == max(map(kept, shapes))


def test_pictures_are_sorted_and_small_ones_are_reported(tmp_path, caplog):
    caplog.set_level("INFO")
    sizes = {"a.png": (64, 64), "b.png": (200, 100), "c.png": (20, 20), "d.png": (100, 210)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name)
    shapes = [(64, 64), (40, 80), (80, 40)]
    buckets = sort_into_buckets(tmp_path, list(sizes), shapes)
    assert buckets == {(40, 80): ["b.png"], (64, 64): ["a.png", "c.png"], (80, 40): ["d.png"]}
    assert "Pictures by shape: 1 of 80 x 40, 2 of 64 x 64, 1 of 40 x 80." in caplog.text
    assert "1 of 4 pictures are smaller than the model's size and are enlarged" in caplog.text


def test_a_batch_has_one_shape_and_can_be_mirrored(tmp_path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 50:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    plain, mirrored = (PicturesOfOneShape(tmp_path, ["half.png"], (40, 80), flip) for flip in (False, True))
    batch = plain.batch(torch.tensor([0, 0]))
    assert batch.shape == (2, 3, 40, 80)
    assert batch[:, :, :, :40].unique().tolist() == [-1]  # ten columns were cropped on each side
    assert batch[:, :, :, 40:].unique().tolist() == [1]
    assert torch.equal(mirrored.batch(torch.tensor([0, 0])), batch.flip(-1))


def test_a_damaged_picture_is_named_before_anything_is_encoded(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"broken\.png"):
        sort_into_buckets(tmp_path, ["broken.png"], [(64, 64)])
