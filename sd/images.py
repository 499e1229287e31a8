"""Pictures on the outside, tensors on the inside.

In: a picture file or a PIL image of any mode, or the decoder's output. Out: what the encoder takes, float32
(1, 3, H, W) in [-1, 1]; or arrays that people take, uint8 (B, H, W, 3); or a PNG file or an animation,
there whole or not at all.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFilter, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from sd.files import write_whole

# Not all that Pillow knows: to read EPS files it starts another program, Ghostscript, and each more is a door more.
FORMATS = ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000"]
FORMATS += ["PPM", "TGA", "ICO", "PCX", "SGI", "QOI"]
ANIMATIONS = {".webp": "WEBP", ".gif": "GIF"}

ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray


def read_image(source: ImageSource, behind: str = "white") -> Image.Image:
    """Read a picture as a viewer shows it: a PIL image of mode RGB, in sRGB, upright, transparency over white.

    `source` is a path, a file that is open for reading bytes, a PIL image, which is left as it is, or an array, uint8
    (H, W, 3) or (H, W). `behind` is another colour to lay it over. Of an animation it is the first frame. Integers
    beyond 8 bits are scaled from 0..65535, floats from 0..1, 0..255 or 0..65535, the smallest of these that holds them.

    Raises FileNotFoundError if there is no such file, ValueError if it is not a whole picture of one of the FORMATS, or
    too large, TypeError for any other kind of source.
    """
    if isinstance(source, np.ndarray):
        grey = source.ndim == 2 and source.dtype == np.uint8
        return _from_array(np.stack([source] * 3, axis=-1) if grey else source)
    if isinstance(source, Image.Image):
        return _load(source, getattr(source, "filename", "") or "the picture", behind)
    if not (isinstance(source, (str, os.PathLike)) or hasattr(source, "read")):
        raise TypeError(f"A picture is a path, an open file, a PIL image or an array, not {type(source).__name__}.")
    name = str(getattr(source, "name", "the open file") if hasattr(source, "read") else source)
    try:
        with _open(source, name) as image:
            return _load(image, name, behind)
    except MemoryError:
        raise ValueError(f"{name} is too large for the memory of this computer: make it smaller first.") from None


def image_to_tensor(
    image: ImageSource, height: int, width: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Tensor:
    """Turn a picture into float32 (1, 3, height, width) in [-1, 1]: pixel / 127.5 - 1.

    A picture of another shape is cropped about its centre, never stretched, and resized.

    Raises ValueError for a size below 1, and what `read_image` raises.
    """
    if height < 1 or width < 1:
        raise ValueError(f"Height and width must be at least 1 pixel, not {height} and {width}.")
    image = read_image(image)
    if image.size != (width, height):
        image = image.resize((width, height), resampling, box=_centre_box(image.size, (width, height)))
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3)
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()  # (1, 3, H, W)


def read_mask_image(mask: ImageSource, image: Image.Image | None = None) -> Image.Image:
    """A mask as `read_image` reads it, except that transparent is black: editors save strokes on an empty layer.

    Raises ValueError if its shape is not that of `image`. It may be larger or smaller: both are cropped alike.
    """
    mask = read_image(mask, behind="black")
    if image is not None:
        (width, height), (other_width, other_height) = image.size, mask.size
        # Equal to a pixel: one of the two may have been scaled down, and a side rounded.
        if abs(width * other_height - other_width * height) > max(*image.size, *mask.size):
            sizes = f"{width} x {height}, not {other_width} x {other_height}"
            raise ValueError(f"mask_image should have the shape of input_image, {sizes} pixels.")
    return mask


def read_mask(mask: ImageSource, height: int, width: int, feather: float = 0) -> Tensor:
    """A mask image of any mode and size -> float32 (1, 1, height, width): 1 where white, 0 where black or transparent.

    `feather` softens its edges by that many pixels, inwards, so that black stays black.
    """
    mask = read_mask_image(mask)
    # Bilinear, because Lanczos, which resizes images, overshoots: black must stay black.
    levels = image_to_tensor(mask, height, width, Image.Resampling.BILINEAR)  # (1, 3, H, W)
    white = (levels.mean(1, keepdim=True) + 1) / 2  # (1, 1, H, W)
    if feather:
        levels = Image.fromarray((white[0, 0].numpy() * 255).round().astype(np.uint8))
        blurred = torch.from_numpy(np.array(levels.filter(ImageFilter.GaussianBlur(feather / 2)))) / 255
        white = white * (2 * blurred - 1).clamp(0, 1)  # the blur is half white at the old edge
    return white


def tensor_to_array(images: Tensor) -> np.ndarray:
    """Turn images (B, 3, H, W) in [-1, 1], on any device, into uint8 (B, H, W, 3): clamped, then rounded.

    Raises ValueError for another shape, and for values that are not numbers.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected images of shape (B, 3, H, W), not {tuple(images.shape)}.")
    if images.isnan().any():
        raise ValueError("The images hold values that are not numbers (NaN): decode them in float32.")
    # Rounded, because truncation darkens every pixel by half a level on average.
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (B, H, W, 3)


def write_png(
    path: str | os.PathLike, image: np.ndarray | Image.Image, parameters: str | None = None, overwrite: bool = False
) -> None:
    """Write a picture, PIL or uint8 (H, W, 3), as a PNG file. A missing folder is made.

    `parameters` goes into the file as the text chunk of that name, where other Stable Diffusion tools look for the
    prompt and settings. The file gets its name only when it is complete; an existing one is replaced only with
    `overwrite`, even if another process takes the name at the last moment.

    Raises FileExistsError if the name is taken, another OSError if the file cannot be written, ValueError for an array
    of another kind.
    """
    image = _from_array(image) if isinstance(image, np.ndarray) else image
    text = PngImagePlugin.PngInfo()
    if parameters is not None:
        # A prompt from the command line can hold half characters (lone surrogates), which no encoding takes.
        text.add_text("parameters", parameters.encode("utf-8", "replace").decode("utf-8"))
    write_whole(Path(path), lambda file: image.save(file, format="PNG", pnginfo=text), overwrite)


def write_animation(
    path: str | os.PathLike,
    frames: Sequence[np.ndarray],
    frame_ms: int = 100,
    last_ms: int = 2000,
    overwrite: bool = False,
) -> None:
    """Write frames, uint8 (H, W, 3), as an animated .webp or .gif file, whichever the path says, that runs for ever.

    Each is shown for `frame_ms` milliseconds, the last one for `last_ms`. As with `write_png`, the file gets its name
    only when it is complete, and the same errors are raised; also ValueError for no frames or another kind of file.
    """
    path = Path(path)
    kind = ANIMATIONS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"An animation should be a {' or '.join(ANIMATIONS)} file, not {path}.")
    if len(frames) == 0:
        raise ValueError("An animation should have at least one frame.")
    first, *rest = map(_from_array, frames)
    durations = [*[frame_ms] * len(rest), last_ms]
    options = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    if kind == "WEBP":
        options["quality"] = 90
    write_whole(path, lambda file: first.save(file, format=kind, **options), overwrite)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"Expected a uint8 array of shape (H, W, 3), not {array.dtype} {array.shape}.")
    return Image.fromarray(array)


def _centre_box(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest region of a picture of `size` (W, H) that has its centre and the shape of `wanted`."""
    width, height = size
    if width * wanted[1] > height * wanted[0]:  # too wide
        width = height * wanted[0] / wanted[1]
    else:
        height = width * wanted[1] / wanted[0]
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    if (width, height) == wanted:  # only cropped: by whole pixels, so that they stay as they are
        left, top = int(left), int(top)
    return left, top, left + width, top + height


def _open(source: str | os.PathLike | BinaryIO, name: str) -> Image.Image:
    """Find out what kind of picture a file holds. `name` is what an error calls it."""
    if not hasattr(source, "read") and os.path.exists(source) and not os.path.isfile(source):
        kind = "folder: give the path of one picture in it" if os.path.isdir(source) else "device or a pipe, not a file"
        raise ValueError(f"{name} is a {kind}.")
    try:
        Image.init()
        return Image.open(source, formats=[known for known in FORMATS if known in Image.OPEN])
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {name}: check the path of the picture.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture that can be read: give a PNG, JPEG or WebP file.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be opened safely: make it smaller first ({error}).") from None
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise whatever the damage leads them to
        raise ValueError(f"{name} cannot be read ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _load(image: Image.Image, name: str, behind: str) -> Image.Image:
    """Decode a picture and bring it to RGB. `name` is what an error calls it."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} is damaged or cut short ({_reason(error)}): get it again.") from error
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.width} x {image.height}.")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged notes of the camera do not damage the picture
        image = image.copy()
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, name)
    alpha = None
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")
    image = _to_srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, behind), alpha)
    # Nothing that a later reader could apply a second time.
    image.info = {}
    return image


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale modes I, I;16 and F to L, or to LA if one value stands for transparent. Pillow itself would clip them."""
    pixels = np.asarray(image)  # (H, W)
    ranges = (1, 255, 65535) if image.mode == "F" else (65535,)
    darkest, brightest = float(pixels.min()), float(pixels.max())  # NaN if there is one, which no range holds
    white = next((white for white in ranges if brightest < white + 1), None)
    if white is None or darkest <= -1:
        raise ValueError(f"{name} has pixels from {darkest:g} to {brightest:g}: save it with 8 or 16 bits.")
    levels = np.empty(pixels.shape, np.uint8)
    for rows, exact in zip(levels, pixels):  # row by row, as float64 takes eight times the memory
        rows[:] = (exact.astype(np.float64) * 255 / white).round().clip(0, 255)
    scaled = Image.fromarray(levels)
    transparent = image.info.get("transparency")
    if transparent is not None:
        scaled.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert 8-bit colours without alpha to RGB, by their colour profile if they carry one that is not sRGB."""
    if image.mode == "P":
        image = image.convert("RGB")
    try:
        if image.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        else:
            return image.convert("RGB")
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError):
        # A broken profile, one for another kind of picture, or a Pillow without colour management.
        return image.convert("RGB")
