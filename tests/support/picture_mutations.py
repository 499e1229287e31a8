"""Image files of every format that Pillow writes, honest and damaged, and files that are not images.

`honest(rng)` returns an image, its file and the EXIF orientation in the file. `case(number)` returns a kind and the
bytes of a file of this kind, such as a damaged one; the same number always gives the same file.
"""

import io
import random
import struct
import zlib
from functools import cache

from PIL import Image, ImageCms

from tests.support.mutations import mutate

# Formats, and the modes that Pillow writes losslessly in them.
LOSSLESS = {
    "PNG": ["1", "L", "LA", "I;16", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "I;16", "F", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "LAB"],
    "BMP": ["1", "L", "P", "RGB"],
    "TGA": ["L", "LA", "P", "RGB", "RGBA"],
    "PPM": ["1", "L", "I;16", "RGB"],
    "PCX": ["1", "L", "P", "RGB"],
    "SGI": ["L", "RGB", "RGBA"],
    "GIF": ["1", "L", "P"],
    "QOI": ["RGB", "RGBA"],
    "WEBP": ["RGB", "RGBA"],
    "ICO": ["RGBA"],
}
LOSSY = {"JPEG": ["L", "RGB", "CMYK", "YCbCr"], "JPEG2000": ["L", "LA", "RGB", "RGBA", "I;16"], "AVIF": ["RGB", "RGBA"]}
FORMATS = [(kind, mode) for table in (LOSSLESS, LOSSY) for kind, modes in table.items() for mode in modes]
WITH_EXIF = ("PNG", "TIFF", "WEBP", "JPEG", "AVIF")
WITH_PROFILE = ("PNG", "TIFF", "WEBP", "JPEG", "AVIF")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

OTHERS = {  # files that are mistaken for images, and files that make some image readers start programs
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch canary) (w) file\nshowpage\n%%EOF\n",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "pdf": b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\n%%EOF",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(18) + b"\1\0\x09\0\0\3" + bytes(100),
    "heic": b"\0\0\0\x18ftypheic" + bytes(100),
    "html": b"<!DOCTYPE html><html></html>",
    "zip": b"PK\3\4" + bytes(100),
    "pickle": b"\x80\4cos\nsystem\n",
    "mp4": b"\0\0\0\x20ftypisom" + bytes(100),
    "nothing": b"",
}


def picture(mode: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Noise in one of Pillow's modes, in blocks, so that lossy codecs change it little."""
    width, height = size
    small = Image.frombytes("RGBA", (4, 4), rng.randbytes(64)).resize(size, Image.Resampling.NEAREST)
    if mode == "F":
        return Image.frombytes("F", size, struct.pack(f"{width * height}f", *small.getchannel(0).tobytes()))
    if mode == "I;16":
        return Image.frombytes(mode, size, b"".join(bytes([0, level]) for level in small.getchannel(0).tobytes()))
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.profileToProfile(small.convert("RGB"), *profiles, outputMode="LAB")
    if mode == "PA":
        return small.convert("RGB").convert("P").convert("PA")
    if mode in ("P", "1", "CMYK", "YCbCr", "RGBX"):
        return small.convert("RGB").convert(mode)
    return small.convert(mode)


def honest(rng: random.Random) -> tuple[str, Image.Image, bytes, int]:
    """The format, a picture, its file, and the EXIF orientation that the file carries (1: not turned)."""
    kind, mode = rng.choice(FORMATS)
    size = rng.choice([(32, 48), (48, 32), (16, 16), (1, 24), (24, 1), (1, 1), (33, 17)])
    size = (16, 16) if kind == "ICO" else (32, 48) if kind in LOSSY else size
    image, orientation, options = picture(mode, size, rng), 1, {}
    if kind in WITH_EXIF and rng.random() < 0.5:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation = rng.randint(1, 8)
    if kind in WITH_PROFILE and mode.startswith("RGB") and rng.random() < 0.3:
        options["icc_profile"] = SRGB
    if kind == "WEBP":
        options["lossless"] = options["exact"] = True
    if kind in ("JPEG", "AVIF"):
        options["quality"] = 95
    if kind in ("GIF", "PNG", "TIFF", "WEBP") and mode in ("P", "RGB", "L") and rng.random() < 0.3:
        options |= {"save_all": True, "append_images": [picture(mode, size, rng) for _ in range(rng.randrange(3))]}
    if kind == "TIFF" and mode in ("L", "RGB", "RGBA", "CMYK"):
        options["compression"] = rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    file = io.BytesIO()
    image.save(file, kind, **options)
    return kind, image, file.getvalue(), orientation


@cache
def seeds() -> dict[str, bytes]:
    """A file of each format and mode."""
    files = {}
    for kind, mode in FORMATS:
        file = io.BytesIO()
        picture(mode, (16, 16), random.Random(0)).save(file, kind)
        files[f"{kind} {mode}"] = file.getvalue()
    return files


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *chunks: bytes, content: bytes = bytes(1000), depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG file with any size in its header, whether or not it fits the content."""
    head = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunks)
        + png_chunk(b"IDAT", zlib.compress(content))
        + png_chunk(b"IEND", b"")
    )


@cache
def bombs() -> list[bytes]:
    """Decompression bombs: small files with a huge size in the header, or with text or a profile that decompresses to
    many megabytes."""
    notes = [zlib.compress(bytes(size)) for size in (1 << 20, 1 << 25)]
    small = {"content": bytes(25 * 8)}
    sizes = [(2**31 - 1, 2**31 - 1), (50_000, 50_000), (2**31 - 1, 1), (0, 5), (9_000, 9_000)]
    return [
        *(png(*size) for size in sizes),
        *(png(20_000, height, content=(b"\0" + bytes(60_000)) * 40) for height in (1, 40)),
        *(png(8, 8, png_chunk(b"zTXt", b"note\0\0" + note), **small) for note in notes),
        *(png(8, 8, png_chunk(b"iTXt", b"note\0\1\0\0\0" + note), **small) for note in notes),
        *(png(8, 8, png_chunk(b"iCCP", b"note\0\0" + note), **small) for note in notes),
        png(8, 8, *[png_chunk(b"tEXt", b"a\0b")] * 5000, **small),
        b"P6 99999 99999 255\n",
        b"P5 " + b"9" * 5000 + b" 1 255\n",
        b"GIF89a" + struct.pack("<2H3B", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<4HB", 0, 0, 65535, 65535, 0),
        b"II*\0\x08\0\0\0" + b"\xff\xff" + b"\0\1\4\0\xff\xff\xff\x7f\0\0\0\0" * 3000,
    ]


def case(number: int) -> tuple[str, bytes]:
    """The kind and the bytes of file `number`."""
    rng = random.Random(number)
    kind = ["honest", "damaged", "damaged", "cut", "bomb", "other"][number % 6]
    if kind == "honest":
        return kind, honest(rng)[2]
    if kind == "bomb":
        return kind, rng.choice(bombs())
    if kind == "other":
        return kind, rng.choice([*OTHERS.values(), rng.randbytes(200)])
    content = honest(rng)[2]
    return kind, content[: rng.randrange(1, len(content))] if kind == "cut" else mutate(content, rng)
