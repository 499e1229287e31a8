"""Read and write image files, and convert images to tensors and back.

The networks use float32 tensors (B, 3, H, W) in [-1, 1]. Users get uint8 arrays (B, H, W, 3) in 0..255, PNG, JPEG
and WebP files, and animations.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFilter, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from sd.files import write_whole
from sd.runtime import warn

# An allow-list. Pillow supports more formats, but each one adds risk: its EPS reader, for example, runs Ghostscript.
FORMATS = ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000"]
FORMATS += ["PPM", "TGA", "ICO", "PCX", "SGI", "QOI"]
LOSSY = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_COMMENT = 64_000  # bytes: a segment of a JPEG file holds at most 65,535
ANIMATIONS = {".webp": "WEBP", ".gif": "GIF"}

ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray


def read_image(source: ImageSource, behind: str = "white", name: str = "source") -> Image.Image:
    """Read an image as a viewer shows it: a PIL image of mode RGB, in sRGB, upright, without transparency.

    `source` is a path, a file opened in binary mode, a PIL image (which is not changed) or an array (`check_array`).
    `behind` is the colour behind transparent pixels. Only the first frame of an animation is read. In files, integers
    of more than 8 bits are scaled from 0..65535, floats from the first of 0..1, 0..255 and 0..65535 that holds them
    all. In errors, `name` stands for a source without a file name.

    Raises FileNotFoundError if the file does not exist, ValueError if it is damaged, too large or not in one of
    the FORMATS, and for an array that is not allowed; TypeError for any other kind of source.
    """
    if isinstance(source, np.ndarray):
        check_array(source, name)
        pixels = source if source.dtype == np.uint8 else (source * np.float32(255)).round().astype(np.uint8)
        return _load(Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels), name, behind)
    if isinstance(source, Image.Image):
        return _load(source, getattr(source, "filename", "") or name, behind)
    if not (isinstance(source, (str, os.PathLike)) or hasattr(source, "read")):
        raise TypeError(f"{name} should be a path, an open file, a PIL image or an array, not {type(source).__name__}.")
    name = str(getattr(source, "name", name) if hasattr(source, "read") else source)
    try:
        with _open(source, name) as image:
            return _load(image, name, behind)
    except MemoryError:
        raise ValueError(f"{name} is too large for the memory of this computer: make it smaller first.") from None


def check_array(array: np.ndarray, name: str = "source") -> None:
    """Raises ValueError, with the argument's `name`, unless an array is an image: (H, W) or (H, W, 1) for grey,
    (H, W, 3) for RGB, (H, W, 4) with alpha; uint8 in 0..255, floats in 0..1, or bools."""
    shape, kind = array.shape, array.dtype
    levels = kind in (np.uint8, bool) or kind.kind == "f"
    if not levels or not (array.ndim == 2 or shape[2:] in ((1,), (3,), (4,))) or 0 in shape:
        raise ValueError(
            f"{name} should be an array (H, W), (H, W, 3) or (H, W, 4) of uint8, floats from 0 to 1 or bools, not "
            f"{kind} {shape}."
        )
    if kind.kind == "f" and not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
        raise ValueError(
            f"{name} should be an array of floats from 0 to 1, not from {array.min():g} to {array.max():g}: for "
            "levels from 0 to 255, convert it with .astype(np.uint8)."
        )


def image_to_tensor(
    image: ImageSource, height: int, width: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Tensor:
    """Turn an image into a float32 tensor (1, 3, height, width) in [-1, 1].

    An image of another size is resized. If its proportions differ, its edges are cropped first: it is never stretched.

    Raises ValueError for a size below 1, and the errors of `read_image`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"Height and width must be at least 1 pixel, not {height} and {width}.")
    image = read_image(image)
    if image.size != (width, height):
        image = image.resize((width, height), resampling, box=_centre_box(image.size, (width, height)))
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3)
    return from_uint8(pixels.permute(2, 0, 1)[None]).contiguous()  # (1, 3, H, W)


def read_mask_image(mask: ImageSource, image: Image.Image | None = None) -> Image.Image:
    """A mask as `read_image` reads it, but with transparent pixels black: editors save strokes on an empty layer.

    Raises ValueError if its proportions are not those of `image`. Its size may differ: both are cropped alike.
    """
    mask = read_image(mask, behind="black", name="mask_image")
    if image is not None:
        (width, height), (other_width, other_height) = image.size, mask.size
        # Equal to a pixel: one of the two may have been scaled down, and a side rounded.
        if abs(width * other_height - other_width * height) > max(*image.size, *mask.size):
            sizes = f"{width} x {height}, not {other_width} x {other_height}"
            raise ValueError(f"mask_image should have the shape of input_image, {sizes} pixels.")
    return mask


def warn_about_mask(mask: Image.Image) -> None:
    """Warns if a mask, as `read_mask_image` returns it, repaints next to nothing or nearly everything."""
    levels = np.asarray(mask.convert("L"))
    brightest, white = levels.max(), (levels > 127).mean()
    if brightest == 0:
        problem = "black everywhere (transparent counts as black), so nothing is repainted"
        remedy = "paint white where the image should change"
    elif brightest < 26:
        problem = f"nearly black, {brightest} of 255 at most, so next to nothing is repainted"
        remedy = "use 255 where the image should change"
    elif white > 0.9:
        problem = f"white on {white:.0%} of the image, so nearly all is repainted"
        remedy = "invert the mask if only the dark part should change"
    else:
        return
    warn(f"mask_image is {problem}: {remedy}.")


def alpha_mask(source: ImageSource) -> Image.Image:
    """The mask in an image's own transparency: white where the image was erased. A PIL image of mode L.

    `fill_transparent` makes the image that goes with it. Raises ValueError for an image without transparent pixels, and
    what `read_image` raises.
    """
    black, white = (read_image(source, behind).convert("L") for behind in ("black", "white"))
    mask = ImageChops.subtract(white, black)  # the two differ by how much shows through: 1 - alpha
    if mask.getbbox() is None:
        raise ValueError("input_image should have transparent parts to make a mask from: it has none.")
    return mask


def fill_transparent(source: ImageSource) -> Image.Image:
    """An image as `read_image` reads it, whose transparent parts continue the colours around them.

    White would shine through wherever a mask from the transparency is soft. Raises what `read_image` raises.
    """
    black, white = (_levels(read_image(source, behind)) for behind in ("black", "white"))
    alpha = 1 - (white - black).mean(1, keepdim=True)  # (1, 1, H, W)
    filled = _over_its_own_blur(black, alpha)  # (1, 3, H, W)
    return Image.fromarray((filled[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def _levels(image: Image.Image) -> Tensor:
    """A PIL image of mode RGB -> float32 (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def _over_its_own_blur(colours: Tensor, alpha: Tensor) -> Tensor:
    """Colours multiplied by alpha (1, 3, H, W), alpha (1, 1, H, W) -> the image over ever coarser copies of itself."""
    size = colours.shape[2:]
    if max(size) == 1:
        return colours / alpha.clamp(min=1e-6)
    halves = (F.avg_pool2d(pixels, 2, ceil_mode=True) for pixels in (colours, alpha))
    behind = F.interpolate(_over_its_own_blur(*halves), size, mode="bilinear")
    return colours + (1 - alpha) * behind


def read_mask(mask: ImageSource, height: int, width: int, feather: float = 0) -> Tensor:
    """A mask image of any mode and size -> float32 (1, 1, height, width): 1 where white, 0 where black or transparent.

    `feather` softens its edges by that many pixels, inwards, so that black stays black.
    """
    mask = read_mask_image(mask)
    # Bilinear, because Lanczos, which resizes images, overshoots: black must stay black.
    levels = image_to_tensor(mask, height, width, Image.Resampling.BILINEAR)  # (1, 3, H, W)
    white = (levels.mean(1, keepdim=True) + 1) / 2  # (1, 1, H, W)
    brightest = white.max()
    if feather and brightest > 0:
        # Relative to the brightest level, because strokes may be grey.
        levels = Image.fromarray((white[0, 0] / brightest * 255).round().numpy().astype(np.uint8))
        blurred = torch.from_numpy(np.array(levels.filter(ImageFilter.GaussianBlur(feather / 2)))) / 255
        soft = white * (2 * blurred - 1).clamp(0, 1)  # the blur is half white at the old edge
        if soft.max() < 0.1 * brightest:
            warn("feather is wider than what is white in mask_image, so next to nothing is repainted: make it smaller.")
        white = soft
    return white


def tensor_to_array(images: Tensor) -> np.ndarray:
    """Turn images (B, 3, H, W) in [-1, 1], on any device, into an array, uint8 (B, H, W, 3).

    Raises ValueError for another shape, and for NaN.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected images of shape (B, 3, H, W), not {tuple(images.shape)}.")
    if images.isnan().any():
        raise ValueError("The images hold values that are not numbers (NaN): decode them in float32.")
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (B, H, W, 3)


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], of the same shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8 in 0..255, of the same shape. Values outside the range are clamped."""
    # Rounding matters: truncation would darken every pixel by half a level on average.
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_png(
    path: str | os.PathLike, image: np.ndarray | Image.Image, parameters: str | None = None, overwrite: bool = False
) -> None:
    """Write an image, PIL or uint8 (H, W, 3), as a PNG file. A missing folder is created.

    `parameters` is stored in the text chunk "parameters", where other Stable Diffusion tools look for the prompt and
    settings. The write is atomic: no partial file ever has this name. An existing file is replaced only with
    `overwrite`, even if another process creates it at the last moment.

    Raises FileExistsError if the file exists, another OSError if it cannot be written, ValueError for an array of
    another shape or dtype.
    """
    image = _from_array(image) if isinstance(image, np.ndarray) else image
    text = PngImagePlugin.PngInfo()
    if parameters is not None:
        # A prompt from the command line can contain lone surrogates, which UTF-8 cannot encode.
        text.add_text("parameters", parameters.encode("utf-8", "replace").decode("utf-8"))
    write_whole(Path(path), lambda file: image.save(file, format="PNG", pnginfo=text), overwrite)


def write_image(
    path: str | os.PathLike, image: np.ndarray | Image.Image, parameters: str | None = None, overwrite: bool = False
) -> None:
    """Write an image as PNG, JPEG or WebP, by the suffix of `path`: .png, .jpg, .jpeg or .webp.

    JPEG and WebP have a quality of 95. Their `parameters` go into the EXIF tag UserComment in UTF-16, where the
    AUTOMATIC1111 web UI reads them. JPEG has room for 32,000 characters, and more are cut off. The rest is as in
    `write_png`.

    Raises the errors of `write_png`, and ValueError for another suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        return write_png(path, image, parameters, overwrite)
    if suffix not in LOSSY:
        raise ValueError(f"An image should be a .png, .jpg, .jpeg or .webp file, not {path}.")
    image = _from_array(image) if isinstance(image, np.ndarray) else image
    options = {"format": LOSSY[suffix], "quality": 95}
    if LOSSY[suffix] == "JPEG":
        options["subsampling"] = 0  # keeps the edges between colours
    if parameters is not None:
        options["exif"] = _user_comment(parameters)
    return write_whole(path, lambda file: image.save(file, **options), overwrite)


def write_animation(
    path: str | os.PathLike,
    frames: Sequence[np.ndarray],
    frame_ms: int = 100,
    last_ms: int = 2000,
    overwrite: bool = False,
) -> None:
    """Write frames, uint8 (H, W, 3), as an animation that loops forever: .webp or .gif, by the suffix of `path`.

    Each frame is shown for `frame_ms` milliseconds, the last one for `last_ms`. The write is atomic.

    Raises the errors of `write_png`, and ValueError for no frames or another suffix.
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


def _user_comment(text: str) -> bytes:
    """EXIF data with one tag, UserComment. Pillow would write it as a list of numbers, which other tools reject."""
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")[:MAX_COMMENT]
    header = b"Exif\0\0MM\0*" + struct.pack(">I", 8)  # offsets count from "MM"; the first directory is at 8
    pointer = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, 4, 1, 26, 0)  # 1 entry: a 32-bit offset; no next directory
    entry = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, 7, len(comment), 44, 0)  # 1 entry: bytes at 44
    return header + pointer + entry + comment


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"Expected a uint8 array of shape (H, W, 3), not {array.dtype} {array.shape}.")
    return Image.fromarray(array)


def _centre_box(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) in an image of `size` (W, H) with the proportions `wanted`."""
    width, height = size
    if width * wanted[1] > height * wanted[0]:  # too wide
        width = height * wanted[0] / wanted[1]
    else:
        height = width * wanted[1] / wanted[0]
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    if (width, height) == wanted:  # no resizing: crop at whole pixels, so that none is interpolated
        left, top = int(left), int(top)
    return left, top, left + width, top + height


def _open(source: str | os.PathLike | BinaryIO, name: str) -> Image.Image:
    """Open an image file without decoding it. Errors call it `name`."""
    if not hasattr(source, "read") and os.path.exists(source) and not os.path.isfile(source):
        kind = "folder: give the path of one image in it" if os.path.isdir(source) else "device or a pipe, not a file"
        raise ValueError(f"{name} is a {kind}.")
    try:
        Image.init()
        return Image.open(source, formats=[known for known in FORMATS if known in Image.OPEN])
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {name}: check the path of the image.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that can be read: give a PNG, JPEG or WebP file.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be opened safely: make it smaller first ({error}).") from None
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file, Pillow's readers can raise anything
        raise ValueError(f"{name} cannot be read ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """The message of an error, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _load(image: Image.Image, name: str, behind: str) -> Image.Image:
    """Decode an image and convert it to RGB. Errors call it `name`."""
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
    except Exception:  # damaged EXIF data does not make the image unreadable
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
    image.info = {}  # so that nothing applies the orientation or the profile again
    return image


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale modes I, I;16 and F to L, or to LA if one value means transparent. Pillow would clip instead of scale."""
    pixels = np.asarray(image)  # (H, W)
    ranges = (1, 255, 65535) if image.mode == "F" else (65535,)
    darkest, brightest = float(pixels.min()), float(pixels.max())  # NaN if any pixel is NaN: no range matches
    white = next((white for white in ranges if brightest < white + 1), None)
    if white is None or darkest <= -1:
        raise ValueError(f"{name} has pixels from {darkest:g} to {brightest:g}: save it with 8 or 16 bits.")
    levels = np.empty(pixels.shape, np.uint8)
    for row, exact in zip(levels, pixels):  # row by row, because float64 takes eight times the memory
        row[:] = (exact.astype(np.float64) * 255 / white).round().clip(0, 255)
    scaled = Image.fromarray(levels)
    transparent = image.info.get("transparency")
    if transparent is not None:
        scaled.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an 8-bit image without alpha to RGB, applying its colour profile if it has one that is not sRGB."""
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
        # A broken profile, a profile for another mode, or a Pillow built without colour management.
        return image.convert("RGB")
