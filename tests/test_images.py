"""Images to tensors and back, and writing PNG files. Reading files is tested in test_images_reading.py."""

import errno
import multiprocessing
import os
import struct
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sd.images import from_uint8, image_to_tensor, read_image, tensor_to_array, to_uint8, write_png

PARAMETERS = "a red house\nSteps: 20, Seed: 1"


def noise(height: int = 6, width: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# To and from tensors


def test_equal_size_is_untouched():
    for image in (noise(), Image.fromarray(noise())):
        tensor = image_to_tensor(image, 6, 9)
        assert tensor.shape == (1, 3, 6, 9)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        expected = torch.from_numpy(noise()).permute(2, 0, 1)[None].float() / 127.5 - 1
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(tensor_to_array(image_to_tensor(levels, 16, 16).to(dtype))[0], levels)


@pytest.mark.parametrize("height, width, top, left", [(6, 4, 0, 2), (6, 7, 0, 1), (3, 9, 1, 0), (2, 9, 2, 0)])
def test_cropped_about_the_centre_without_blur(height, width, top, left):
    tensor = image_to_tensor(noise(6, 9), height, width)
    np.testing.assert_array_equal(tensor_to_array(tensor)[0], noise(6, 9)[top : top + height, left : left + width])


@pytest.mark.parametrize("height, width", [(60, 300), (300, 60), (100, 100)])
def test_never_stretched(height, width):
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([x - width / 2, y - height / 2, 0 * x], -1) / 2 + 128  # half a level a pixel, 128 in the centre
    result = (image_to_tensor(ramps.astype(np.uint8), 40, 40)[0] + 1) * 127.5
    inside = result[:, 4:-4, 4:-4]
    scale = min(height, width) / 40
    across, down = inside[0].diff(dim=1).mean(), inside[1].diff(dim=0).mean()
    torch.testing.assert_close(torch.stack([across, down]), torch.full((2,), scale / 2), rtol=0.03, atol=0)
    torch.testing.assert_close(inside.mean((1, 2))[:2], torch.full((2,), 127.5), rtol=0, atol=0.75)


sizes = st.integers(1, 70)


@given(sizes, sizes, sizes, sizes)
def test_any_size_to_any_size(height, width, new_height, new_width):
    image = np.full((height, width, 3), (10, 128, 250), np.uint8)
    result = tensor_to_array(image_to_tensor(image, new_height, new_width))
    np.testing.assert_array_equal(result, np.full((1, new_height, new_width, 3), (10, 128, 250)))


@pytest.mark.parametrize("height, width", [(0, 8), (8, -1)])
def test_bad_size(height, width):
    with pytest.raises(ValueError, match="must be at least 1 pixel"):
        image_to_tensor(noise(), height, width)


@pytest.mark.parametrize("array", [noise()[..., :2], noise()[0, 0], noise().astype(np.float32), noise()[:0]])
def test_bad_array(array, tmp_path):
    with pytest.raises(ValueError, match="Expected a uint8 array of shape"):
        write_png(tmp_path / "a.png", array)


def test_an_array_of_levels_is_grey(tmp_path):
    levels = noise()[..., 0]
    grey = np.stack([levels] * 3, axis=-1)
    assert torch.equal(image_to_tensor(levels, *levels.shape), image_to_tensor(grey, *levels.shape))
    with pytest.raises(ValueError, match="Expected a uint8 array of shape"):
        write_png(tmp_path / "a.png", levels)


def test_uint8_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    images = from_uint8(pixels)
    assert images.dtype == torch.float32
    assert images[0, 0] == -1
    assert images[1, -1] == 1
    assert torch.equal(to_uint8(images), pixels)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_tensor_is_clamped_and_rounded():
    values = torch.tensor([-9.0, -1, -0.9969, -0.9955, 0, 0.9969, 1, 9])
    array = tensor_to_array(values.expand(2, 3, 1, 8))
    assert array.dtype == np.uint8
    assert array.shape == (2, 1, 8, 3)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array[1, 0, :, 2], [0, 0, 0, 1, 128, 255, 255, 255])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    values = torch.linspace(-1, 1, 48).to(dtype).reshape(1, 3, 4, 4).requires_grad_()
    np.testing.assert_array_equal(tensor_to_array(values), tensor_to_array(values.float()))


def test_bad_tensor():
    with pytest.raises(ValueError, match=r"Expected images of shape \(B, 3, H, W\), not \(3, 8, 8\)"):
        tensor_to_array(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="not numbers"):
        tensor_to_array(torch.full((1, 3, 8, 8), torch.nan))


# Writing


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_written_is_read(tmp_path_factory, height, width, seed):
    path = tmp_path_factory.mktemp("images") / "a.png"
    array = noise(height, width, seed)
    for image in (array, Image.fromarray(array)):
        write_png(path, image, overwrite=True)
        np.testing.assert_array_equal(read_image(path), array)


def chunks(path) -> dict[bytes, bytes]:
    data, place, found = path.read_bytes(), 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        found[data[place + 4 : place + 8]] = data[place + 8 : place + 8 + length]
        place += length + 12
    return found


@pytest.mark.parametrize("text, kind", [(PARAMETERS, b"tEXt"), ("café", b"tEXt"), ("a 猫", b"iTXt"), ("", b"tEXt")])
def test_parameters(tmp_path, text, kind):
    path = tmp_path / "a.png"
    write_png(path, noise(), text)
    assert chunks(path)[kind].startswith(b"parameters\0")
    assert Image.open(path).text == {"parameters": text}


def test_no_parameters_no_text(tmp_path):
    write_png(tmp_path / "a.png", noise())
    assert Image.open(tmp_path / "a.png").text == {}


def test_lone_surrogates_in_the_prompt_are_replaced(tmp_path):
    write_png(tmp_path / "a.png", noise(), "caf\udce9")
    assert Image.open(tmp_path / "a.png").text == {"parameters": "caf?"}


def test_folder_is_created_and_nothing_else_left(tmp_path):
    write_png(tmp_path / "new" / "folder" / "a.png", noise())
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["a.png"]


def test_file_has_the_usual_permissions(tmp_path):
    write_png(tmp_path / "a.png", noise())
    (tmp_path / "b").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode


def no_hard_links(*_):
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["hard links", "no hard links"])
def links(request, monkeypatch):
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", no_hard_links)


def test_existing_file_is_kept(tmp_path, links):
    path = tmp_path / "a.png"
    write_png(path, noise())
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.png exists already and is left as it is: choose another name"):
        write_png(path, noise(seed=1))
    assert path.read_bytes() == before
    write_png(path, noise(seed=1), overwrite=True)
    np.testing.assert_array_equal(read_image(path), noise(seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_name_taken_at_the_last_moment(tmp_path, links, monkeypatch):
    path = tmp_path / "a.png"
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (sync(number), path.write_text("theirs")))
    with pytest.raises(FileExistsError, match="exists already"):
        write_png(path, noise())
    assert path.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def attempt(path, seed: int) -> bool:
    try:
        write_png(path, noise(seed=seed))
    except FileExistsError:
        return False
    return True


def test_race_of_threads_has_one_winner(tmp_path, links):
    for round_ in range(10):
        path, won, start = tmp_path / f"{round_}.png", {}, threading.Barrier(4)

        def run(seed, path=path, won=won, start=start):
            start.wait()
            won[seed] = attempt(path, seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [seed for seed in won if won[seed]]
        assert len(winners) == 1
        np.testing.assert_array_equal(read_image(path), noise(seed=winners[0]))
    assert len(list(tmp_path.iterdir())) == 10


@pytest.mark.slow
def test_race_of_processes_has_one_winner(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(50)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        won = list(pool.map(attempt, [p for p in paths for _ in range(2)], [0, 1] * len(paths)))
    assert [won[i] + won[i + 1] for i in range(0, 100, 2)] == [1] * 50
    assert len(list(tmp_path.iterdir())) == 50


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_leaves_nothing(tmp_path, monkeypatch, failure, step):
    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "link", no_hard_links)
    monkeypatch.setattr(os, step, fail)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else OSError
    with pytest.raises(expected) as caught:
        write_png(tmp_path / "a.png", noise())
    if expected is OSError:
        assert str(caught.value) == f"{tmp_path / 'a.png'} cannot be written (No space left on device)."
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", no_hard_links)
    with pytest.raises(OSError, match=r"a\.png cannot be written \(Operation not permitted\)"):
        write_png(path, noise(), overwrite=True)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"a\.png cannot be written \(.*file is not a folder\)"):
        write_png(tmp_path / "file" / "a.png", noise())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"a\.png cannot be written \(Permission denied\)"):
        write_png(tmp_path / "a.png", noise())


def test_text_of_other_tools_does_not_leak(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "old")
    Image.fromarray(noise()).save(tmp_path / "a.png", pnginfo=text)
    write_png(tmp_path / "b.png", Image.open(tmp_path / "a.png"), "new")
    assert Image.open(tmp_path / "b.png").text == {"parameters": "new"}
