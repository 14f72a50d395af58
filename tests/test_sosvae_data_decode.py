"""Decoding: what a file says about orientation, depth, transparency, colour and pages."""

import struct

import numpy as np
import pytest
from image_cases import COLOUR, DEEP, FLOATS, GREY, RAMP, TRANSPARENT, H, W, png, saved, tiff
from PIL import Image

from sosvae import DataConfig, load
from sosvae.data import decode


def decoded(raw: bytes, channels: int = 1) -> np.ndarray:
    """[H, W] for one channel, [H, W, 3] for three."""
    pixels = decode.decode(raw, DataConfig(height=H, width=W, channels=channels)).pixels.astype(int)
    return pixels[0] if channels == 1 else np.moveaxis(pixels, 0, -1)


# --- Orientation --------------------------------------------------------------------------------------------

TURNS = {  # EXIF orientation → what a camera stored of an upright image
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_stand_upright(form, orientation):
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](RAMP)))
    exif = stored.getexif()
    exif[274] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 100}, "TIFF": {}, "WEBP": {"lossless": True}}[form]
    assert np.abs(decoded(saved(stored, form, exif=exif, **options)) - RAMP).max() <= (2 if form == "JPEG" else 0)


def test_deep_and_transparent_images_stand_upright_too():
    for values in (np.rot90(RAMP, 1).astype(np.uint16) * 257, np.rot90(RAMP, 1)):
        stored = Image.fromarray(np.ascontiguousarray(values))
        if values.dtype == np.uint8:
            stored.putalpha(255)
        exif = stored.getexif()
        exif[274] = 6
        assert np.array_equal(decoded(saved(stored, exif=exif)), RAMP)


# --- Depth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, case in GREY.items() if case[1] is not None])
def test_every_depth_is_scaled_from_black_to_white(kind):
    raw, expected, error = GREY[kind]
    assert np.abs(decoded(raw) - expected).max() <= error
    in_colour = decoded(raw, channels=3)
    assert np.abs(in_colour - np.asarray(expected)[..., None]).max() <= error


def test_colour_spaces_become_rgb():
    assert np.abs(decoded(GREY["ycbcr"][0], channels=3) - COLOUR).max() <= 3
    lab = decoded(GREY["lab"][0], channels=3)  # a grey axis of lightness: neutral, dark to bright
    assert np.ptp(lab, axis=-1).max() <= 2
    assert lab[0, 0].max() <= 1
    assert lab[-1, -1].min() >= 254


UNFAITHFUL = {
    "signed-16": (tiff(DEEP.astype(np.int16), sample_format=2), "signed"),
    "signed-8": (tiff(RAMP.astype(np.int8), sample_format=2), "signed"),
    "signed-32": (tiff(DEEP.astype(np.int32), sample_format=2), "signed"),
    "float-range": (tiff(FLOATS * 3000 - 5, sample_format=3), "float values from -5 to 2995"),
    "float-nan": (tiff(FLOATS * np.float32(np.nan), sample_format=3), "float values from nan"),
    "16-bit-colour-key": (png(np.repeat(DEEP[..., None], 3, -1), 16, 2, struct.pack(">3H", 257, 258, 9)), "16-bit"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 18\n", "UnidentifiedImageError: cannot identify"),
}


@pytest.mark.parametrize("kind", UNFAITHFUL)
def test_images_without_a_faithful_reading_are_named_and_skipped(tmp_path, kind):
    raw, message = UNFAITHFUL[kind]
    for i in range(3):
        Image.fromarray(RAMP + np.uint8(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "odd.tif").write_bytes(raw)
    with pytest.warns(UserWarning, match=rf"skipped 1 of 4 .*odd\.tif \({message}"):
        images = load(DataConfig(source=f"folder:{tmp_path}", height=H, width=W, cache=str(tmp_path / ".cache")))
    assert images.names == ["0.png", "1.png", "2.png"]


# --- Transparency -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_shows_black_and_never_what_is_hidden(kind):
    raw, expected = TRANSPARENT[kind]
    assert np.array_equal(decoded(raw), expected)
    assert np.array_equal(decoded(raw, channels=3), np.repeat(np.asarray(expected)[..., None], 3, -1))


def test_half_transparent_is_half_as_bright():
    image = Image.fromarray(np.full((H, W), 200, np.uint8))
    image.putalpha(128)
    assert np.unique(decoded(saved(image))).tolist() == [100]


def test_hidden_colours_do_not_bleed_in_when_sizes_change():
    image = Image.fromarray(np.full((4 * H, 4 * W), 255, np.uint8))
    image.putalpha(0)
    assert decoded(saved(image)).max() == 0


# --- Grey or colour -----------------------------------------------------------------------------------------


def test_modes_of_files_do_not_stop_grey_data(tmp_path):
    grey = Image.fromarray(RAMP)
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "rgb.png")
    grey.convert("P").save(tmp_path / "palette.png")
    grey.save(tmp_path / "web.webp", lossless=True)
    images = load(DataConfig(source=f"folder:{tmp_path}", height=H, width=W, cache=str(tmp_path / ".cache")))
    assert all(np.array_equal(image[0], RAMP) for image in images.images)


def test_one_grey_image_does_not_stop_colour_data(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    for i in range(3):
        Image.fromarray(np.roll(COLOUR, i, 0)).save(tmp_path / f"{i}.png")
    settings = DataConfig(source=f"folder:{tmp_path}", height=H, width=W, channels=3, cache=str(tmp_path / ".cache"))
    images = load(settings)
    assert np.array_equal(images.images[3], np.stack([RAMP] * 3))
    for i in range(3):
        Image.fromarray(RAMP + np.uint8(i)).convert("RGB").save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"grey images alone \(4\), but channels is 3"):
        load(settings)


# --- Pages --------------------------------------------------------------------------------------------------


def test_of_many_pages_the_first_is_taken_and_it_is_said(tmp_path):
    pages = [Image.fromarray(np.roll(RAMP, i, 0)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.png", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "c.webp", save_all=True, append_images=pages[1:], lossless=True)
    pages[0].save(tmp_path / "d.png")
    with pytest.warns(UserWarning, match=r"first page of 3 files with more: a\.tif, b\.png, c\.webp"):
        images = load(DataConfig(source=f"folder:{tmp_path}", height=H, width=W, cache=str(tmp_path / ".cache")))
    assert all(np.array_equal(image[0], RAMP) for image in images.images)
