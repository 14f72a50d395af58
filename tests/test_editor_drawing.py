"""Drawing in a real browser: strokes, undo, keys, fingers."""

import numpy as np
from editor_cases import (  # noqa: F401  (fixtures among them)
    chromium,
    draw,
    folder,
    page,
    panel,
    press,
    ready,
    server,
    settled,
    shown,
    spot,
    tab,
    until,
)

# --- Drawing --------------------------------------------------------------------------------------------------


def test_the_rest_follows_under_the_brush_and_undo_takes_it_back(page):  # noqa: F811
    before = shown(page)
    page.mouse.move(*spot(page, 5, 5))
    page.mouse.down()
    page.mouse.move(*spot(page, 9, 9), steps=5)
    during = shown(page)
    assert during[5, 5] == 255
    assert (during[15:] != before[15:]).any(), "the image follows before the button is released"
    page.mouse.up()
    after = shown(page)
    assert after[9, 9] == 255
    press(page, "Control+z")
    np.testing.assert_array_equal(shown(page), before)
    press(page, "Control+Shift+Z")
    np.testing.assert_array_equal(shown(page), after)


def test_a_hundred_strokes_and_undos_leave_the_image_as_it_began(page):  # noqa: F811
    before = shown(page)
    page.evaluate(
        """async () => {
          const {app} = sosvae; let random = 1;
          const next = (n) => (random = (random * 16807) % 2147483647) % n;
          for (let i = 0; i < 100; i++) {
            app.setPrefs({tool: ['paint', 'erase', 'pin', 'recolour', 'paint'][i % 5], diameter: 1 + next(6),
                          tau: i % 3 ? 0 : 0.05, mirror: i % 4, colour: Array(3).fill(next(256) / 255)});
            const stroke = app.newStroke([next(20), next(24), app.prefs.diameter]);
            app.begin(stroke);
            for (let j = 0; j < 5; j++) app.grow([next(20), next(24), app.prefs.diameter]);
            app.end();
            if (i % 10 === 0) await app.engine.ask({type: 'stats', view: app.doc.view});
          }
        }"""
    )
    assert np.abs(shown(page) - before).max() > 20
    for _ in range(100):
        page.keyboard.press("Control+z")
    assert np.abs(shown(page) - before).max() == 0
    assert page.evaluate("sosvae.app.frame.pinned") == 0


def test_pinning_what_is_shown_changes_nothing(page):  # noqa: F811
    before = shown(page)
    page.keyboard.press("p")
    draw(page, (3, 3), (15, 15))
    assert page.evaluate("sosvae.app.frame.pinned") > 10
    assert np.abs(shown(page) - before).max() <= 1


def test_unpinning_gives_pixels_back(page):  # noqa: F811
    before = shown(page)
    draw(page, (4, 4), (10, 4))
    page.keyboard.press("e")
    page.evaluate("sosvae.app.setPrefs({diameter: 9})")
    draw(page, (2, 4), (13, 4))
    assert page.evaluate("sosvae.app.frame.pinned") == 0
    assert np.abs(shown(page) - before).max() <= 1


def test_a_lasso_fills_its_inside(page):  # noqa: F811
    page.keyboard.press("l")
    draw(page, (3, 3), (14, 3), (14, 14), (3, 14))
    image = shown(page)
    assert (image[5:13, 5:13] == 255).all()
    assert page.evaluate("sosvae.app.frame.pinned") <= 12 * 12


def test_symmetry_and_brush_of_one_pixel(page):  # noqa: F811
    page.keyboard.press("x")
    for _ in range(5):
        page.keyboard.press("[")
    assert page.evaluate("sosvae.app.prefs.diameter") == 1
    draw(page, (2, 6), (2, 6))
    image = shown(page)
    assert image[6, 2] == 255
    assert image[6, 17] == 255
    assert page.evaluate("sosvae.app.frame.pinned") == 2


def test_a_stroke_goes_on_over_the_border(page):  # noqa: F811
    page.mouse.move(*spot(page, 1, 12))
    page.mouse.down()
    page.mouse.move(*spot(page, -6, 12), steps=3)
    page.mouse.move(*spot(page, -6, 18), steps=3)
    page.mouse.move(*spot(page, 1, 18), steps=3)
    page.mouse.up()
    image = shown(page)
    assert image[12, 0] == image[18, 0] == 255
    assert page.evaluate("sosvae.app.doc.strokes.length") == 1


def test_a_firm_stroke_holds_and_a_soft_one_gives_way(page):  # noqa: F811
    page.evaluate("sosvae.app.setPrefs({diameter: 1})")
    draw(page, (4, 4), (4, 4))
    panel(page, "Edit")
    firmness = page.get_by_label("How firmly stroke 1 is meant, number")
    firmness.fill("0")
    soft = shown(page)
    assert soft[4, 4] < 255
    firmness.fill("100")
    assert shown(page)[4, 4] == 255


def test_only_on_release_where_that_is_asked_for(page):  # noqa: F811
    panel(page, "Edit")
    page.get_by_label("Follow while the pointer moves").uncheck()
    before = shown(page)
    page.mouse.move(*spot(page, 5, 5))
    page.mouse.down()
    page.mouse.move(*spot(page, 9, 9), steps=5)
    np.testing.assert_array_equal(shown(page), before)
    page.mouse.up()
    assert shown(page)[9, 9] == 255


def test_escape_gives_a_stroke_up(page):  # noqa: F811
    before = shown(page)
    page.mouse.move(*spot(page, 5, 5))
    page.mouse.down()
    page.mouse.move(*spot(page, 9, 9), steps=5)
    page.keyboard.press("Escape")
    page.mouse.up()
    np.testing.assert_array_equal(shown(page), before)
    assert page.evaluate("sosvae.app.history.entries.length") == 1


# --- Keys, zoom, fingers --------------------------------------------------------------------------------------


def test_painting_by_keyboard_alone(page):  # noqa: F811
    page.locator("#canvas").focus()
    for key in ["Shift+ArrowLeft", "ArrowUp", "Enter"]:
        page.keyboard.press(key)
    x, y = page.evaluate("[sosvae.stage.cursor.x, sosvae.stage.cursor.y]")
    assert shown(page)[int(y), int(x)] == 255


def test_a_lasso_by_keyboard_alone(page):  # noqa: F811
    page.keyboard.press("l")
    page.locator("#canvas").focus()
    before = shown(page)
    for key in ["ArrowUp"] * 5 + ["Enter"] + ["Shift+ArrowRight", "Enter"] + ["Shift+ArrowDown", "Enter"]:
        page.keyboard.press(key)
    np.testing.assert_array_equal(shown(page), before)
    page.keyboard.press("Enter")
    inside = page.evaluate("sosvae.app.frame.pinned")
    assert 20 < inside < 40
    assert shown(page)[8, 16] == 255
    page.keyboard.press("Control+z")
    np.testing.assert_array_equal(shown(page), before)
    for key in ["Enter", "ArrowRight", "Enter", "ArrowUp", "Enter", "Escape"]:
        page.keyboard.press(key)
    assert page.evaluate("sosvae.app.doc.strokes.length") == 0
    page.keyboard.press("Enter")
    page.get_by_role("tab", name="Edit", exact=True).focus()
    assert page.evaluate("sosvae.app.live") is None


def test_a_colour_is_taken_by_keyboard_and_the_view_follows_the_cursor(page):  # noqa: F811
    page.evaluate("sosvae.stage.zoomBy(4)")
    page.locator("#canvas").focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowDown")
    assert page.evaluate("[Math.floor(sosvae.stage.cursor.x), Math.floor(sosvae.stage.cursor.y)]") == [19, 23]
    x, y = spot(page, 19, 23)
    box = page.locator("#canvas").bounding_box()
    assert box["x"] <= x <= box["x"] + box["width"]
    assert box["y"] <= y <= box["y"] + box["height"]
    page.keyboard.press("i")
    page.keyboard.press("Enter")
    assert round(255 * page.evaluate("sosvae.app.prefs.colour[0]")) == shown(page)[23, 19]


def test_a_pen_presses(page):  # noqa: F811
    page.evaluate("sosvae.app.setPrefs({diameter: 10}); sosvae.stage.canvas.setPointerCapture = () => {}")
    widths = []
    for pressure in (0.05, 1):
        x, y = spot(page, 10, 12)
        for kind in ("pointerdown", "pointerup"):
            page.evaluate(
                "([kind, x, y, pressure]) => sosvae.stage.canvas.dispatchEvent(new PointerEvent(kind, {pointerId: 5,"
                " pointerType: 'pen', button: 0, bubbles: true, clientX: x, clientY: y, pressure}))",
                [kind, x, y, pressure],
            )
        settled(page)
        widths.append(page.evaluate("sosvae.app.frame.pinned"))
        page.evaluate("sosvae.app.undo()")
    assert widths[0] < 10 < 60 < widths[1]


def test_undo_on_a_layout_of_another_script(page):  # noqa: F811
    draw(page, (5, 5), (9, 9))
    page.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'я', code: 'KeyZ', ctrlKey: true}))")
    assert page.evaluate("sosvae.app.doc.strokes.length") == 0


def test_letters_typed_into_a_number_are_no_shortcuts(page):  # noqa: F811
    page.get_by_label("Seed", exact=True).focus()
    page.keyboard.press("e")
    assert page.evaluate("sosvae.app.prefs.tool") == "paint"


def test_the_wheel_zooms_about_the_pointer_by_whole_pixels(page):  # noqa: F811
    x, y = spot(page, 4, 20)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -120)
    until(page, "Number.isInteger(sosvae.stage.zoom)")
    place = page.evaluate("([x, y]) => sosvae.stage.place(x, y)", [x, y])
    assert int(place["x"]) == 4
    assert int(place["y"]) == 20
    left = page.evaluate("sosvae.stage.left")
    page.mouse.down(button="middle")
    page.mouse.move(x + 40, y)
    page.mouse.up(button="middle")
    assert page.evaluate("sosvae.stage.left") == left + 40
    assert page.evaluate("sosvae.app.doc.strokes.length") == 0


def test_one_finger_draws_and_two_pinch(chromium, server):  # noqa: F811
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True, device_scale_factor=2)
    phone = context.new_page()
    phone.goto(server)
    ready(phone)
    session = context.new_cdp_session(phone)

    def touch(kind, *points):
        places = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    a, b = spot(phone, 6, 6), spot(phone, 12, 6)
    touch("touchStart", a)
    touch("touchMove", b)
    touch("touchEnd")
    assert shown(phone)[6, 9] == 255
    zoom = phone.evaluate("sosvae.stage.zoom")
    touch("touchStart", a)
    touch("touchStart", a, b)
    touch("touchMove", (a[0] - 60, a[1]), (b[0] + 60, b[1]))
    touch("touchEnd")
    assert phone.evaluate("sosvae.stage.zoom") > zoom
    assert phone.evaluate("sosvae.app.doc.strokes.length") == 1
    context.close()


def test_alt_takes_a_colour(page):  # noqa: F811
    expected = shown(page)[7, 8]
    page.keyboard.down("Alt")
    page.mouse.click(*spot(page, 8, 7))
    page.keyboard.up("Alt")
    assert round(255 * page.evaluate("sosvae.app.prefs.colour[0]")) == expected
