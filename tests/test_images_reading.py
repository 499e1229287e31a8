"""Reading images of every format, orientation and mode, and refusing other files."""

import io
import re
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from sd import generate, model_loader
from sd.images import read_image


def noise(height: int = 6, width: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reopened(image: Image.Image, file_format: str = "PNG", **options) -> Image.Image:
    """The image, saved and opened again."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def first_pixel(image: Image.Image) -> tuple[int, ...]:
    return read_image(image).getpixel((0, 0))


# Sources


def test_reads_path_open_file_and_image(tmp_path):
    path = tmp_path / "a picture.png"
    Image.fromarray(noise()).save(path)
    with open(path, "rb") as file:
        for source in (path, str(path), file, Image.open(path)):
            image = read_image(source)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(image, noise())
        assert not file.closed


@pytest.mark.parametrize("source", [Image.fromarray(noise()), noise()], ids=["image", "array"])
def test_given_image_is_not_changed(source):
    image = read_image(source)
    np.testing.assert_array_equal(image, noise())
    image.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(source, noise())


@pytest.mark.parametrize(
    "array, seen",
    [
        (np.array([[False, True]]), [[0, 255]]),
        (np.array([[0.0, 0.5, 1.0]]), [[0, 128, 255]]),
        (np.array([[0.0, 1.0]], np.float16), [[0, 255]]),
        (np.array([[[3], [4]]], np.uint8), [[3, 4]]),
        (np.array([[[9, 9, 9, 255], [9, 9, 9, 0]]], np.uint8), [[9, 255]]),
    ],
    ids=["bools", "floats", "float16", "one channel", "alpha"],
)
def test_arrays_of_other_kinds(array, seen):
    assert np.asarray(read_image(array)).tolist() == [[[level] * 3 for level in row] for row in seen]


SHAPES = r"(H, W), (H, W, 3) or (H, W, 4) of uint8, floats from 0 to 1 or bools"


@pytest.mark.parametrize(
    "array, problem",
    [
        (np.zeros((4, 4), np.int64), rf"an array {SHAPES}, not int64 (4, 4)."),
        (np.zeros((4, 4), np.uint16), rf"an array {SHAPES}, not uint16 (4, 4)."),
        (np.zeros((1, 3, 4, 4), np.float32), rf"an array {SHAPES}, not float32 (1, 3, 4, 4)."),
        (np.zeros((3, 4, 5), np.uint8), rf"an array {SHAPES}, not uint8 (3, 4, 5)."),
        (np.zeros((4, 4, 2), np.uint8), rf"an array {SHAPES}, not uint8 (4, 4, 2)."),
        (np.zeros((0, 4, 3), np.uint8), rf"an array {SHAPES}, not uint8 (0, 4, 3)."),
        (np.zeros((4, 4), complex), rf"an array {SHAPES}, not complex128 (4, 4)."),
        (np.array([[0.0, 255.0]]), "an array of floats from 0 to 1, not from 0 to 255: for levels"),
        (np.array([[-1.0, 1.0]]), "an array of floats from 0 to 1, not from -1 to 1: for levels"),
        (np.array([[np.nan, 1.0]]), "an array of floats from 0 to 1, not from nan to nan: for levels"),
    ],
)
@pytest.mark.parametrize("name", ["input_image", "mask_image"])
def test_bad_arrays_are_named_before_any_work(monkeypatch, name, array, problem):
    with pytest.raises(ValueError, match=f"^source should be {re.escape(problem)}"):
        read_image(array)
    monkeypatch.setattr(model_loader, "load_models", lambda **_: pytest.fail("loaded before checking"))
    images = {"input_image": noise(), "mask_image": noise()}
    with pytest.raises(ValueError, match=f"^{name} should be {re.escape(problem)}"):
        generate("a cat", **(images | {name: array}))


def bad_file(tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "cut":
        Image.fromarray(noise(64, 64)).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("missing", FileNotFoundError, "There is no file .*missing: check the path"),
        ("folder", ValueError, "folder is a folder: give the path of one image"),
        ("empty", ValueError, "empty is not an image that can be read: give a PNG"),
        ("text", ValueError, "text is not an image that can be read: give a PNG"),
        ("cut", ValueError, "cut is damaged or cut short"),
    ],
)
def test_bad_file_is_named(tmp_path, kind, error, message):
    with pytest.raises(error, match=message):
        read_image(bad_file(tmp_path, kind))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_file_is_a_value_error_or_a_picture(file_format, recwarn):
    file = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(file, file_format)
    whole, rng = file.getvalue(), np.random.default_rng(0)
    messages = []
    for _ in range(60):
        broken = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, len(broken), 4):
            broken[place] = rng.integers(0, 256)
        try:
            assert read_image(io.BytesIO(bytes(broken))).mode == "RGB"
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(message.startswith("source ") for message in messages)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.fromarray(noise()).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"bomb\.png is too large to be opened safely"):
        read_image(path)


def test_no_pixels():
    with pytest.raises(ValueError, match="has no pixels: its size is 0 x 5"):
        read_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("source", [None, 3, [noise()]])
def test_other_sources(source):
    with pytest.raises(TypeError, match="source should be a path, an open file, a PIL image or an array, not"):
        read_image(source)


# Orientation

STORED = {  # EXIF orientation: how a camera stores `a`, which is what a viewer should show
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied_once(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](noise())))
    image = read_image(reopened(stored, file_format, exif=exif))
    np.testing.assert_array_equal(image, noise())
    np.testing.assert_array_equal(read_image(image), noise())
    np.testing.assert_array_equal(read_image(reopened(image)), noise())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored():
    image = reopened(Image.fromarray(noise()), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    np.testing.assert_array_equal(read_image(image), noise())


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 40, 90)])
def test_colour_survives_its_mode(mode, colour):
    image = Image.new("RGB", (4, 3), colour)
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(mode)
    if mode in ("1", "L"):
        colour = (image.getpixel((0, 0)),) * 3
    image = read_image(image)
    assert (image.mode, image.size) == ("RGB", (4, 3))
    np.testing.assert_allclose(image.getpixel((0, 0)), colour, atol=25 if mode == "P" else 4)


@pytest.mark.parametrize("alpha", [0, 1, 77, 128, 254, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_over_white(mode, alpha):
    grey = mode == "LA"
    image = Image.new(mode, (2, 2), (10, alpha) if grey else (10, 100, 200, alpha))
    colour = np.array([10, 10, 10] if grey else [10, 100, 200])
    expected = np.rint((colour * alpha + 255 * (255 - alpha)) / 255)
    for source in (image, reopened(image)):
        np.testing.assert_array_equal(first_pixel(source), expected)


def test_alpha_of_palettes():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 40, 90, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    image = read_image(reopened(palette, transparency=b"\x33\xff"))
    np.testing.assert_array_equal(image, [[(244, 212, 222), (0, 0, 255)]])
    assert first_pixel(palette.convert("PA")) == (200, 40, 90)
    assert first_pixel(reopened(palette, "GIF", transparency=0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode, colour", [("L", 7), ("1", 0), ("RGB", (1, 2, 3)), ("I;16", 700)], ids=["L", "1", "RGB", "I;16"]
)
def test_colour_that_stands_for_transparent(mode, colour):
    assert first_pixel(reopened(Image.new(mode, (2, 2), colour), transparency=colour)) == (255, 255, 255)
    assert max(first_pixel(reopened(Image.new(mode, (2, 2), colour)))) < 8


@pytest.mark.parametrize("mode, file_format", [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", None)])
def test_16_bit_grey_keeps_its_tones(mode, file_format):
    ramp = np.linspace(0, 65535, 640).round().reshape(2, 320)
    if mode == "I;16B":
        image = Image.frombytes(mode, (320, 2), ramp.astype(">u2").tobytes())
    else:
        image = Image.fromarray(ramp.astype("<i4" if mode == "I" else "<u2"))
    assert image.mode == mode
    image = reopened(image, file_format) if file_format else image
    levels = np.asarray(read_image(image))
    np.testing.assert_array_equal(levels, np.rint(ramp / 257)[..., None].repeat(3, 2))


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_keep_their_tones(white):
    ramp = np.linspace(0, white, 256, dtype=np.float32)[None]
    np.testing.assert_array_equal(np.asarray(read_image(Image.fromarray(ramp)))[0, :, 0], np.arange(256))


@pytest.mark.parametrize("value", [70000, -5, np.nan, np.inf])
def test_pixels_out_of_range(value):
    with pytest.raises(ValueError, match=r"has pixels from .*: save it with 8 or 16 bits"):
        read_image(Image.fromarray(np.full((2, 2), value, np.float32)))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(file_format):
    red, blue = (Image.new("RGB", (5, 4), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if file_format == "WEBP" else {}
    animation = reopened(red, file_format, save_all=True, append_images=[blue], **options)
    assert animation.n_frames == 2
    assert first_pixel(animation) == (255, 0, 0)


# Colour profiles


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile(name: str = "test") -> bytes:
    """A profile that swaps red and green. `name` has four letters."""
    profile = SRGB.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def linear_grey_profile() -> bytes:
    """A profile whose levels are proportional to light (gamma 1)."""
    tags = {
        b"desc": struct.pack(">4s4xI5s78x", b"desc", 5, b"test"),
        b"wtpt": struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061),
        b"kTRC": struct.pack(">4s4xIH2x", b"curv", 1, 1 << 8),  # gamma 1
    }
    place, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += struct.pack(">4s2I", tag, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4x4B4s4s4s12x4s", place + len(body), 2, 64, 0, 0, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def test_colour_profile_is_applied_once():
    image = reopened(Image.new("RGB", (2, 2), (200, 40, 90)), icc_profile=swapped_profile())
    seen = read_image(image)
    np.testing.assert_allclose(seen.getpixel((0, 0)), (40, 200, 90), atol=1)
    assert read_image(seen).getpixel((0, 0)) == seen.getpixel((0, 0))


def test_colour_profile_leaves_alpha_alone():
    image = reopened(Image.new("RGBA", (2, 2), (255, 0, 0, 51)), icc_profile=swapped_profile())
    np.testing.assert_allclose(first_pixel(image), (204, 255, 204), atol=1)


@pytest.mark.parametrize("mode, pixel, seen", [("L", 55, 128), ("LA", (55, 51), 230)])
def test_grey_profile(mode, pixel, seen):
    # A fifth of the light is level 128 in sRGB. Level 128 over white, with an opacity of a fifth, is 230.
    assert first_pixel(reopened(Image.new(mode, (2, 2), pixel), icc_profile=linear_grey_profile())) == (seen,) * 3


@pytest.mark.parametrize("profile", [b"broken", SRGB, swapped_profile("sRGB")], ids=["broken", "sRGB", "named sRGB"])
def test_broken_and_srgb_profiles_change_nothing(profile):
    image = reopened(Image.fromarray(noise()), icc_profile=profile)
    np.testing.assert_array_equal(read_image(image), noise())


def test_profile_for_another_kind_of_picture_is_ignored():
    image = read_image(reopened(Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF", icc_profile=swapped_profile()))
    assert image.getpixel((0, 0)) == first_pixel(image) == (0, 255, 255)
