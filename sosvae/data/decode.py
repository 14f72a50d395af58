"""From the bytes of one image file to uint8 [channels, height, width], or a statement of why that cannot be.

What the file says is heeded: orientation, depth, transparency. Colours are taken as the numbers that are stored: no
colour profile is applied.
"""

import io
import re
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig

if TYPE_CHECKING:  # Pillow is of the extra `train` and imported where it is used
    from PIL import Image

__all__ = ["VERSION", "Picture", "UnreadableError", "decode", "reason", "shown"]

VERSION = 2  # counts up when the same file gives other pixels, so that no old cache is read
BACKGROUND = "black"  # under what is transparent, and around what is padded

# Tried by content. Others are left alone: Pillow hands PostScript, for one, to an interpreter that executes it.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # modes of more than a byte
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
UNSIGNED, SIGNED = 1, 2  # values of SAMPLE_FORMAT
WHITE_IS_ZERO = 0  # value of PHOTOMETRIC


class UnreadableError(ValueError):
    """The file is whole, but its values do not say how bright they are."""


class Picture(NamedTuple):
    """One decoded image."""

    pixels: NDArray[np.uint8]  # [channels, height, width]
    more_pages: bool  # the file holds others, which were left


def decode(raw: bytes, config: DataConfig) -> Picture:
    """Decodes the first page of a file, brings it upright and to the size and the channels of `config`.

    Grey or colour is what `config` asks for, whatever the file's mode is.

    Raises:
        UnreadableError: the file does not say which value is white. Anything else: what Pillow raises on a broken file.
    """
    from PIL import Image, ImageOps

    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata; whether a file is read does not depend on the caller's filters
        image: Image.Image = Image.open(io.BytesIO(raw), formats=[name for name in FORMATS if name in Image.OPEN])
        more_pages = bool(getattr(image, "is_animated", False))
        image.load()
        upright = image if image.format == "TIFF" else ImageOps.exif_transpose(image)  # Pillow itself turns a TIFF
        plain = _composite(_to_bytes(image, upright, raw))
        if config.channels == 1:
            plain = plain.convert("L")
        size = (config.width, config.height)
        if plain.size != size and config.fit == "crop":
            plain = ImageOps.fit(plain, size, Image.Resampling.LANCZOS)
        elif plain.size != size:
            plain = ImageOps.pad(plain, size, Image.Resampling.LANCZOS, color=BACKGROUND)
        array = np.asarray(plain if config.channels == 1 else plain.convert("RGB"), dtype=np.uint8)
    return Picture(array[None] if config.channels == 1 else np.moveaxis(array, -1, 0), more_pages)


def _to_bytes(image: "Image.Image", upright: "Image.Image", raw: bytes) -> "Image.Image":
    """`upright` with a byte for each value. `image` is the same as it was opened, with what its format says."""
    tags: Any = getattr(image, "tag_v2", {})
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise UnreadableError("signed integers do not say which value is white")
    key = upright.info.get("transparency")
    if image.format == "PNG" and key is not None and image.mode != "P":
        upright.info["transparency"] = key = _transparent_value(key, image.mode, depth=raw[24])
    return _scaled(upright, image.format, tags, key) if upright.mode in DEEP else upright


def _transparent_value(key: Any, mode: str, depth: int) -> Any:
    """A PNG's transparent colour on the scale of Pillow's pixels; the file counts it in the image's own depth."""
    if mode == "RGB":
        if depth == 16:
            raise UnreadableError("16-bit colour with a transparent colour: which pixels it hits cannot be told")
        return tuple(value & 255 for value in key)
    if mode in ("1", "L"):
        return 255 if mode == "1" and key else (key & (1 << depth) - 1) * 255 // ((1 << depth) - 1)
    return key


def _scaled(image: "Image.Image", form: str | None, tags: Any, key: int | None) -> "Image.Image":
    """Grey values of more than a byte, from the format's black and white to 0 and 255."""
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())  # NaN where a value is
        if not 0 <= low <= high <= 1:
            raise UnreadableError(f"float values from {low:g} to {high:g}, expected 0 to 1")
        grey = np.rint(values * 255.0)
    else:
        bits = max(tags.get(BITS_PER_SAMPLE, (16,)))  # PNG and PPM: Pillow brings them to 16 bits
        white = (1 << bits) - 1
        values = values.view(np.uint32) if image.mode == "I" else values
        if bits > 16:
            grey = np.rint(values * (255.0 / white))
        else:  # a table: large images need no floats
            table = np.rint(np.arange(white + 1) * (255.0 / white)).astype(np.uint8)
            grey = table[np.minimum(values, white)]
    if form == "TIFF" and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    result = Image.fromarray(grey.astype(np.uint8))
    if key is not None:
        result = Image.merge("LA", (result, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))
    return result


def _composite(image: "Image.Image") -> "Image.Image":
    """The image without transparency, in mode L or RGB: what is transparent shows the background."""
    from PIL import Image

    palette = getattr(image, "palette", None)
    if image.mode in WITH_ALPHA or "transparency" in image.info or (palette and palette.mode == "RGBA"):
        if image.mode == "La":
            image = image.convert("LA")
        below = Image.new("RGBA", image.size, BACKGROUND)
        below.alpha_composite(image.convert("RGBA"))
        image = below
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def reason(error: BaseException) -> str:
    """Why a file was not read, in one line without addresses, which would differ from run to run."""
    text = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip().partition("\n")[0][:200]
    if isinstance(error, UnreadableError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shown(name: str) -> str:
    """A file's name for messages: bytes that are no UTF-8, and line breaks, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
