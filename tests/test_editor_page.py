"""The editor in a real browser, as a person uses it, on its server."""

import io
import json
import re

import numpy as np
import pytest
from editor_cases import (  # noqa: F401  (fixtures among them)
    chromium,
    draw,
    folder,
    page,
    panel,
    press,
    ready,
    server,
    serving,
    settled,
    shown,
    spot,
    tab,
    until,
)
from PIL import Image

# --- Panels ---------------------------------------------------------------------------------------------------


def test_a_seed_reproduces_a_sample_and_the_grain_is_held(page):  # noqa: F811
    panel(page, "Sample")
    page.get_by_role("radio", name="Sample").first.click()
    first = shown(page)
    page.get_by_role("button", name="New sample").click()
    assert (shown(page) != first).any()
    page.get_by_label("Seed of the image", exact=True).fill("0")
    page.keyboard.press("Enter")
    np.testing.assert_array_equal(shown(page), first)
    page.get_by_label("Temperature of the grain, number").fill("0")
    smooth = shown(page)
    page.get_by_label("Temperature of the whole, number").fill("0")
    page.get_by_role("radio", name="Mean").first.click()
    mean = shown(page)
    page.get_by_role("radio", name="Sample").first.click()
    np.testing.assert_array_equal(shown(page), mean)
    assert (smooth != mean).any()


def test_components_scale_reset_lock_and_undo(page):  # noqa: F811
    panel(page, "Components")
    page.get_by_role("button", name="Show a sample").click()
    first = shown(page)
    page.get_by_label("Component 1, number").fill("2.5")
    changed = shown(page)
    assert (changed != first).any()
    page.get_by_role("button", name="Lock component 1").click()
    page.get_by_role("button", name="Silence all").click()
    assert page.evaluate("sosvae.app.doc.view.scales") == [2.5, 0, 0, 0, 0]
    page.get_by_role("button", name="Lock component 1").click()
    page.get_by_role("button", name="Reset all").click()
    np.testing.assert_array_equal(shown(page), first)
    for _ in range(4):
        press(page, "Control+z")
    np.testing.assert_array_equal(shown(page), changed)


def test_a_dragged_slider_is_one_step_of_undo(page):  # noqa: F811
    panel(page, "Components")
    box = page.get_by_label("Component 1", exact=True).bounding_box()
    entries = page.evaluate("sosvae.app.history.entries.length")
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    assert page.evaluate("sosvae.app.history.entries.length") == entries + 1


def test_looking_at_covariances_under_the_pointer(page):  # noqa: F811
    panel(page, "Look")
    page.get_by_role("radio", name="Covariance").click()
    page.mouse.move(*spot(page, 3, 3))
    first = shown(page)
    page.mouse.move(*spot(page, 15, 20))
    assert (shown(page) != first).any()
    page.mouse.click(*spot(page, 15, 20))
    assert page.evaluate("sosvae.app.doc.strokes.length") == 0
    page.locator("#panel-look .facts", has_text="nats").wait_for()


def test_codes_from_seed_image_and_between(page):  # noqa: F811
    first = shown(page)
    page.get_by_label("Seed", exact=True).fill("7")
    page.keyboard.press("Enter")
    ready(page)
    second = shown(page)
    assert (second != first).any()
    page.get_by_role("button", name="Set B to this code").click()
    press(page, "Control+z")
    ready(page)
    np.testing.assert_array_equal(shown(page), first)
    page.get_by_role("button", name="Set A to this code").click()
    page.get_by_label("From A to B, number").fill("1")
    until(page, "sosvae.app.loaded.header.code.kind === 'mix' && !sosvae.app.busy")
    assert np.abs(shown(page) - second).max() <= 1
    page.get_by_role("button", name=re.compile("Held-out image")).first.click()
    until(page, "sosvae.app.loaded.header.code.kind === 'heldout' && !sosvae.app.busy")
    page.get_by_text("The reconstruction is off by").wait_for()


def test_an_upload_and_a_refused_one(page, folder):  # noqa: F811
    choose = page.get_by_label("Image to encode")
    choose.set_input_files(folder / "images" / "00.png")
    page.get_by_text("The reconstruction is off by").wait_for()
    assert page.evaluate("sosvae.app.doc.code.kind") == "vector"
    choose.set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"<svg/>"})
    page.get_by_text("this is no image that can be read").wait_for()
    assert page.evaluate("sosvae.app.doc.code.kind") == "vector"


def test_interpolation_is_saved_as_png_gif_and_film(page):  # noqa: F811
    panel(page, "Interpolate")
    until(page, "document.querySelectorAll('#panel-interpolate .thumb').length === 25")
    page.wait_for_timeout(300)
    settled(page)
    begins = {"PNG": b"\x89PNG", "GIF": b"GIF89a", "WebM": b"\x1a\x45\xdf\xa3"}
    for name in begins:
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        with open(download.value.path(), "rb") as file:
            assert file.read(8).startswith(begins[name])


def test_corners_and_the_place_along_an_edge_are_undone_and_kept(page):  # noqa: F811
    panel(page, "Interpolate")
    film = page.locator("#panel-interpolate canvas.film")
    picture = "(canvas) => canvas.toDataURL()"
    until(page, "document.querySelector('canvas.film').width === 20")
    settled(page)
    first = film.evaluate(picture)
    page.get_by_label("Along the edge, number").fill("0.5")
    settled(page)
    page.wait_for_timeout(150)
    assert film.evaluate(picture) != first
    page.keyboard.press("Tab")
    page.get_by_label("Seed of the top left corner").fill("77")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Other corners").click()
    corners = page.evaluate("sosvae.app.doc.walk.corners")
    assert len(set(corners)) == 4
    link = page.evaluate("async () => { const {app} = sosvae; return JSON.stringify(app.doc.walk); }")
    for _ in range(3):
        press(page, "Control+z")
    assert page.evaluate("sosvae.app.doc.walk") == {"corners": [11, 22, 33, 44], "edge": 0, "t": 0}
    page.wait_for_timeout(300)
    settled(page)
    assert film.evaluate(picture) == first
    for _ in range(3):
        press(page, "Control+Shift+Z")
    assert page.evaluate("JSON.stringify(sosvae.app.doc.walk)") == link
    page.get_by_role("button", name="Play").click()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Stop").click()
    assert page.evaluate("sosvae.app.doc.walk.t") > 0.5


def test_two_runs_under_one_brush(page):  # noqa: F811
    """In a model of independent pixels an edit changes what it touches and nothing else."""
    panel(page, "Compare")
    page.locator("#panel-compare select").select_option("beta")
    until(page, "sosvae.app.frame.other && !sosvae.app.busy")
    other = "Array.from(sosvae.app.frame.other.rgba).filter((_, i) => i % 4 === 0)"
    settled(page)
    before = [shown(page), np.array(page.evaluate(other)).reshape(24, 20)]
    page.evaluate("sosvae.app.setPrefs({diameter: 1, colour: [0, 0, 0]})")
    draw(page, (5, 5), (5, 5))
    after = [shown(page), np.array(page.evaluate(other)).reshape(24, 20)]
    assert (after[0] != before[0]).sum() > 20
    changed = np.argwhere(after[1] != before[1])
    assert changed.tolist() == [[5, 5]]


# --- Sessions -------------------------------------------------------------------------------------------------


def test_a_link_and_a_file_bring_the_session_back(page, tab, server, tmp_path):  # noqa: F811
    draw(page, (3, 3), (12, 10))
    page.keyboard.press("p")
    draw(page, (4, 18), (14, 18))
    panel(page, "Components")
    page.get_by_label("Component 2, number").fill("2")
    press(page, "s")
    expected = shown(page)
    panel(page, "Save")
    page.get_by_role("button", name="Copy link").click()
    until(page, "location.hash.length > 10")
    link = page.url
    files = {}
    for name in ("JSON", "PNG, 1:1"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        files[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[name])
    assert len(files["JSON"].read_bytes()) < 6000, "seeds and strokes, no arrays"
    page.goto("about:blank")
    page.goto(link)
    ready(page)
    np.testing.assert_array_equal(shown(page), expected)
    for file in files.values():
        page.goto(server)
        ready(page)
        panel(page, "Save")
        page.get_by_label("Session to open").set_input_files(file)
        until(page, "sosvae.app.doc.strokes.length === 2")
        np.testing.assert_array_equal(shown(page), expected)


def test_a_broken_session_is_told_and_changes_nothing(page):  # noqa: F811
    panel(page, "Save")
    sound = {"run": "sos", "code": {"kind": "seed", "seed": 1}, "strokes": []}
    wrong = (
        {"strokes": [{"tool": "rm"}]},
        {"view": {"scales": "x"}},
        {"view": {"mode": "rm"}},
        {"view": {"seed": None}},
        {"walk": {"corners": [1, 2, 3, 4], "edge": 9, "t": 0}},
    )
    sessions = [json.dumps({"format": "sosvae-edit", "doc": {**sound, **patch}}) for patch in wrong]
    for text in ("{", "[]", *sessions):
        page.get_by_label("Session to open").set_input_files(
            {"name": "x.json", "mimeType": "application/json", "buffer": text.encode()}
        )
        page.get_by_text("this is no session").wait_for()
        page.evaluate("document.querySelector('.message').textContent = ''")
    assert page.evaluate("sosvae.app.history.entries.length") == 1


def test_saving_into_the_run_s_folder(page, folder):  # noqa: F811
    draw(page, (5, 5), (9, 9))
    panel(page, "Save")
    page.get_by_role("button", name="Save into the run's folder").click()
    page.get_by_text("Saved as edits/").wait_for()
    saved = sorted((folder / "runs" / "sos" / "edits").iterdir())
    assert [file.suffix for file in saved] == [".json", ".png"] or [file.suffix for file in saved] == [".png", ".json"]
    session = json.loads(next(file for file in saved if file.suffix == ".json").read_text(encoding="utf-8"))
    assert len(session["doc"]["strokes"]) == 1


def test_the_log_goes_back_to_any_step(page):  # noqa: F811
    first = shown(page)
    for y in (3, 8, 13):
        draw(page, (3, y), (12, y))
    panel(page, "Save")
    entries = page.locator("#panel-save .log button")
    assert entries.all_inner_texts() == ["Opened", "Painted", "Painted", "Painted"]
    entries.first.click()
    np.testing.assert_array_equal(shown(page), first)
    entries.last.click()
    assert shown(page)[13, 8] == 255


def test_two_tabs_do_not_disturb_each_other(page, server):  # noqa: F811
    other = page.context.new_page()
    other.goto(server)
    ready(other)
    before = shown(other)
    draw(page, (5, 5), (12, 12))
    np.testing.assert_array_equal(shown(other), before)
    page.keyboard.press("]")
    other.reload()
    ready(other)
    assert other.evaluate("sosvae.app.prefs.diameter") == 4, "settings are remembered"
    other.close()


# --- For everybody --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_that_axe_would_find(page, theme):  # noqa: F811
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=theme)
    draw(page, (5, 5), (9, 9))
    # All rules in one theme; only colours differ in the other.
    only = {} if theme == "light" else {"runOnly": ["color-contrast"]}
    for name in ["Codes", "Edit", "Sample", "Components", "Interpolate", "Look", "Compare", "Save"]:
        panel(page, name)
        page.wait_for_timeout(150)
        found = Axe().run(page, options={"resultTypes": ["violations"], **only}).response["violations"]
        assert not found, [(v["id"], [node["html"] for node in v["nodes"]][:3]) for v in found]


@pytest.mark.parametrize("size", [(360, 640), (820, 1100), (821, 600), (1440, 900)], ids=str)
def test_everything_fits_into_the_window(page, size):  # noqa: F811
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.wait_for_timeout(50)
    boxes = [page.locator(f".{name}").bounding_box() for name in ("tools", "options", "view", "corner")]
    for box in boxes:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart_x = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            apart_y = a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"]
            assert apart_x or apart_y, "no island covers another"
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


@pytest.mark.parametrize("ratio", [1, 2, 1.5])
def test_canvas_has_the_screen_s_pixels(chromium, server, ratio):  # noqa: F811
    context = chromium.new_context(viewport={"width": 1000, "height": 700}, device_scale_factor=ratio)
    window = context.new_page()
    window.goto(server)
    ready(window)
    width, css = window.evaluate("[sosvae.stage.canvas.width, sosvae.stage.canvas.clientWidth]")
    assert width == pytest.approx(css * ratio, abs=1)
    assert float(window.evaluate("sosvae.stage.zoom")).is_integer()
    x, y = spot(window, 3, 4)
    shot = window.screenshot(clip={"x": x - 1, "y": y - 1, "width": 2, "height": 2}, type="png")
    drawn = np.array(Image.open(io.BytesIO(shot)).convert("L")).astype(int)
    assert np.abs(drawn - shown(window)[4, 3]).max() <= 1, "one pixel of the image, sharp"
    context.close()
