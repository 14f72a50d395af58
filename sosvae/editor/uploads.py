"""A stranger's file as an image of the run's shape, within limits of bytes and pixels.

Only pixels leave this module: EXIF (place, camera, thumbnail) and every other text in the file stay behind.
"""

import io
import warnings

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..data.decode import decode

__all__ = ["MAX_BYTES", "MAX_PIXELS", "UploadError", "read_image"]

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MIN_SIDE = 8
MAX_ASPECT = 20  # of the longer side to the shorter one: beyond that hardly anything of the image would be left
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")


class UploadError(ValueError):
    """The file is no image that can be taken; the message is for its owner."""


def read_image(raw: bytes, config: DataConfig) -> NDArray[np.uint8]:
    """Bytes [C, H, W]: upright, cut or padded to the run's proportions as its data was.

    Raises:
        UploadError: too many bytes or pixels, another format, a broken file, too narrow a strip.
    """
    from PIL import Image

    if len(raw) > MAX_BYTES:
        raise UploadError(f"the file has {len(raw) / 2**20:.0f} MiB, at most {MAX_BYTES // 2**20} are taken")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning of bombs; the limit below is stricter
            image = Image.open(io.BytesIO(raw), formats=FORMATS)  # reads the header alone
        _check_size(*image.size)
        return decode(raw, config).pixels
    except UploadError:
        raise
    except Exception as error:  # Pillow raises nearly every kind on broken files
        raise UploadError(f"this is no image that can be read ({', '.join(FORMATS)})") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UploadError(f"the image is {width}×{height}, at most {MAX_PIXELS // 10**6} million pixels are taken")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise UploadError(
            f"the image is {width}×{height}: at least {MIN_SIDE} pixels a side, and at most {MAX_ASPECT} times as "
            "long as wide, are needed"
        )
