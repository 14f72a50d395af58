"""Image files of many kinds, byte by byte where Pillow writes none, with the grey values that they stand for."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

H, W = 18, 20
RAMP = (np.arange(H * W).reshape(H, W) * 255 // (H * W - 1)).astype(np.uint8)  # every grey of a fine scale, 0 and 255
COLOUR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], -1)


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(values: np.ndarray, depth: int, kind: int, trns: bytes = b"") -> bytes:
    """A PNG of `depth` bits and `kind` 0 grey, 2 colour, 4 grey with alpha, 6 colour with alpha; [H, W(, bands)]."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = values.reshape(values.shape[0], -1)
    if depth < 8:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., -depth:].reshape(len(rows), -1)
        lines = np.packbits(bits, axis=-1)
    else:
        lines = rows.astype(">u2" if depth == 16 else np.uint8)
    data = b"".join(b"\0" + line.tobytes() for line in lines)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + (chunk(b"tRNS", trns) if trns else b"") + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(
    values: np.ndarray, photometric: int = 1, sample_format: int = 1, bits: int | None = None, extra=None
) -> bytes:
    """An uncompressed TIFF of one strip, in the byte order of `values` [H, W(, bands)]; `bits` for packed 12-bit."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    bands = 1 if values.ndim == 2 else values.shape[2]
    depth = bits or values.dtype.itemsize * 8
    data = values.tobytes()
    if bits == 12:
        flat = values.astype(int).reshape(values.shape[0], -1)
        nibbles = np.stack([flat >> 8, flat >> 4 & 15, flat & 15], -1).reshape(-1)
        data = (nibbles[::2] << 4 | nibbles[1::2]).astype(np.uint8).tobytes()
    tags = {256: [values.shape[1]], 257: [values.shape[0]], 258: [depth] * bands, 259: [1], 262: [photometric]}
    tags |= {273: [8], 277: [bands], 278: [values.shape[0]], 279: [len(data)], 339: [sample_format]}
    if extra is not None:
        tags[338] = [extra]
    place = 8 + len(data)
    ifd, more = struct.pack(order + "H", len(tags)), b""
    after = place + 2 + 12 * len(tags) + 4
    for tag, content in sorted(tags.items()):
        kind = 4 if tag in (273, 279) else 3
        body = struct.pack(f"{order}{len(content)}{'I' if kind == 4 else 'H'}", *content)
        if len(body) > 4:
            body, more = struct.pack(order + "I", after + len(more)), more + body
        ifd += struct.pack(order + "HHI", tag, kind, len(content)) + body.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", place)
    return start + data + ifd + bytes(4) + more


DEEP = RAMP.astype(np.uint16) * 257
FLOATS = (RAMP / 255).astype(np.float32)


def pgm(values: np.ndarray, maxval: int, plain: bool = False) -> bytes:
    if plain:
        return f"P2\n{W} {H}\n{maxval}\n{' '.join(map(str, values.ravel().tolist()))}\n".encode()
    return f"P5\n{W} {H}\n{maxval}\n".encode() + values.astype(">u2" if maxval > 255 else np.uint8).tobytes()


GREY = {
    "png-1": (png(RAMP > 127, 1, 0), (RAMP > 127) * 255, 0),
    "png-2": (png(RAMP // 64, 2, 0), RAMP // 64 * 85, 0),
    "png-4": (png(RAMP // 16, 4, 0), RAMP // 16 * 17, 0),
    "png-8": (png(RAMP, 8, 0), RAMP, 0),
    "png-16": (png(DEEP, 16, 0), RAMP, 0),
    "png-16-between": (png(np.minimum(DEEP.astype(int) + 100, 65535), 16, 0), RAMP, 0),  # to the nearest grey
    "png-16-colour": (png(np.repeat(DEEP[..., None], 3, -1), 16, 2), RAMP, 0),
    "pgm-3": (pgm(RAMP // 64, 3), RAMP // 64 * 85, 0),
    "pgm-1023": (pgm(RAMP * 1023.0 // 255, 1023), RAMP, 1),
    "pgm-65535": (pgm(DEEP, 65535), RAMP, 0),
    "pgm-plain-65535": (pgm(DEEP, 65535, plain=True), RAMP, 0),
    "pbm": (saved(Image.fromarray(RAMP > 127), "PPM"), (RAMP > 127) * 255, 0),
    "ppm-65535": (f"P6\n{W} {H}\n65535\n".encode() + np.repeat(DEEP, 3).astype(">u2").tobytes(), RAMP, 0),
    "pfm": (b"Pf\n%d %d\n-1.0\n" % (W, H) + FLOATS[::-1].tobytes(), RAMP, 0),
    "tiff-8": (tiff(RAMP), RAMP, 0),
    "tiff-8-white-is-zero": (tiff(255 - RAMP, photometric=0), RAMP, 0),
    "tiff-12": (tiff(RAMP * 4095.0 // 255, bits=12), RAMP, 1),
    "tiff-16": (tiff(DEEP), RAMP, 0),
    "tiff-16-big-endian": (tiff(DEEP.astype(">u2")), RAMP, 0),
    "tiff-16-white-is-zero": (tiff(65535 - DEEP, photometric=0), RAMP, 0),
    "tiff-16-lzw": (saved(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"), RAMP, 0),
    "tiff-32": (tiff(RAMP.astype(np.uint32) * 0x01010101), RAMP, 0),
    "tiff-float": (tiff(FLOATS, sample_format=3), RAMP, 0),
    "tiff-float-big-endian": (tiff(FLOATS.astype(">f4"), sample_format=3), RAMP, 0),
    "tiff-float-white-is-zero": (tiff(1 - FLOATS, photometric=0, sample_format=3), RAMP, 0),
    "tiff-1": (saved(Image.fromarray(RAMP > 127), "TIFF"), (RAMP > 127) * 255, 0),
    "tiff-colour-16": (tiff(np.repeat(DEEP[..., None], 3, -1), photometric=2), RAMP, 0),
    "palette": (saved(Image.fromarray(RAMP).convert("P")), RAMP, 0),
    "bmp": (saved(Image.fromarray(RAMP), "BMP"), RAMP, 0),
    "gif": (saved(Image.fromarray(RAMP), "GIF"), RAMP, 0),
    "webp": (saved(Image.fromarray(RAMP), "WEBP", lossless=True), RAMP, 0),
    "rgb": (saved(Image.fromarray(RAMP).convert("RGB")), RAMP, 0),
    "cmyk": (saved(Image.fromarray(RAMP).convert("CMYK"), "TIFF"), RAMP, 1),
    "cmyk-jpeg": (saved(Image.fromarray(RAMP).convert("CMYK"), "JPEG", quality=100), RAMP, 3),
    "ycbcr": (saved(Image.fromarray(COLOUR).convert("YCbCr"), "TIFF"), None, 2),
    "lab": (tiff(np.stack([RAMP, RAMP * 0, RAMP * 0], -1), photometric=8), None, 0),
}


KEY = int(RAMP[4, 4])
HIDDEN = np.zeros((H, W), bool)
HIDDEN[:9] = True
ALPHA = np.where(HIDDEN, 0, 255).astype(np.uint8)
VISIBLE = np.where(HIDDEN, 0, RAMP)  # on black
KEYED = np.where(RAMP == KEY, 0, RAMP)


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(RAMP).convert(mode)
    image.putalpha(Image.fromarray(ALPHA))
    return image


def paletted(**options) -> bytes:
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([i for i in range(256) for _ in range(3)])
    return saved(image, **options)


TRANSPARENT = {
    "la": (saved(with_alpha("L")), VISIBLE),
    "rgba": (saved(with_alpha("RGB")), VISIBLE),
    "la-16": (png(np.stack([DEEP, ALPHA.astype(int) * 257], -1), 16, 4), VISIBLE),
    "rgba-16": (png(np.stack([DEEP] * 3 + [ALPHA.astype(int) * 257], -1), 16, 6), VISIBLE),
    "rgba-webp": (saved(with_alpha("RGB"), "WEBP", lossless=True, exact=True), VISIBLE),
    "rgba-tiff": (saved(with_alpha("RGB"), "TIFF"), VISIBLE),
    "la-tiff": (saved(with_alpha("L"), "TIFF"), VISIBLE),
    "la-tiff-premultiplied": (tiff(np.stack([VISIBLE.astype(np.uint8), ALPHA], -1), extra=1), VISIBLE),
    "la-tiff-extra": (tiff(np.stack([RAMP, ALPHA], -1), extra=0), RAMP),  # the second value is no alpha
    "rgba-tiff-premultiplied": (
        tiff(np.stack([VISIBLE.astype(np.uint8)] * 3 + [ALPHA], -1), photometric=2, extra=1),
        VISIBLE,
    ),
    "key-1": (png(RAMP > 127, 1, 0, b"\0\1"), RAMP * 0),
    "key-2": (png(RAMP // 64, 2, 0, b"\0\2"), np.where(RAMP // 64 == 2, 0, RAMP // 64 * 85)),
    "key-4": (png(RAMP // 16, 4, 0, b"\0\x0b"), np.where(RAMP // 16 == 11, 0, RAMP // 16 * 17)),
    "key-8": (png(RAMP, 8, 0, struct.pack(">H", KEY)), KEYED),
    "key-16": (png(DEEP, 16, 0, struct.pack(">H", KEY * 257)), KEYED),
    "key-16-near": (png(DEEP, 16, 0, struct.pack(">H", KEY * 257 + 1)), RAMP),  # hits no pixel
    "key-colour": (png(np.repeat(RAMP[..., None], 3, -1), 8, 2, struct.pack(">3H", KEY, KEY, KEY)), KEYED),
    "palette-index": (paletted(transparency=KEY), KEYED),
    "palette-alphas": (paletted(transparency=bytes(0 if i == KEY else 255 for i in range(256))), KEYED),
    "gif": (paletted(form="GIF", transparency=KEY), KEYED),
}
