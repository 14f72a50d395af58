"""Every head in a real browser: in the page where it can, by the server where not, and the page says which."""

import base64

import numpy as np
import pytest
from editor_cases import (  # noqa: F401  (fixtures among them)
    chromium,
    draw,
    make_images,
    make_run,
    panel,
    press,
    ready,
    serving,
    settled,
    shown,
    spot,
    tab,
    until,
)

from sosvae.editor.export import export
from sosvae.editor.parameters import Prediction, pack, unpack
from sosvae.editor.runs import Runs

HEADS = ("structured", "heavy", "global-local", "precision", "pixelwise")
BY_SERVER = "after each stroke the server does"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chromium):  # noqa: F811
    root = tmp_path_factory.mktemp("heads")
    images = make_images(root / "images", channels=3)
    for head in HEADS:
        make_run(root / "runs" / head, images, head=head, channels=3)
    return root


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder / "runs") as (address, _):
        yield address


def open_run(page, server, head, by_server=False):
    """The page at a run; `by_server`: as if its images were too large to be conditioned in the page."""
    page.goto(server)
    ready(page)
    if by_server:
        page.evaluate("sosvae.app.limit = 0")
    page.evaluate("(run) => sosvae.app.change('run', {run, code: {kind: 'seed', seed: 3}})", head)
    until(page, f"sosvae.app.loaded.header.run === '{head}' && !sosvae.app.busy")


def rested(page):
    """Waits until the server has answered and what follows is shown."""
    until(page, "sosvae.app.rested === sosvae.app.doc")
    settled(page)


def conditional(page, **more):
    """What the server's `p.condition` makes of the pins that the page has: bytes of all channels."""
    raw = page.evaluate(
        """async (more) => {
          const {app} = sosvae, {doc} = app;
          const pinned = await app.engine.ask({type: 'pinned', slot: 'main'});
          const buffer = await app.source.condition({run: doc.run, code: doc.code, ...pinned, ...more});
          return btoa(String.fromCharCode(...new Uint8Array(buffer)));
        }""",
        more,
    )
    loc = unpack(base64.b64decode(raw))[1]["loc"]
    return np.clip(255 * loc[: 24 * 20].reshape(24, 20), 0, 255)


@pytest.mark.parametrize("head", HEADS)
def test_in_the_page_it_is_the_conditional(tab, server, head):  # noqa: F811
    open_run(tab, server, head)
    assert tab.locator(".banner.calm").is_hidden()
    before = shown(tab)
    tab.mouse.move(*spot(tab, 5, 5))
    tab.mouse.down()
    tab.mouse.move(*spot(tab, 9, 9), steps=3)
    moving = shown(tab)
    tab.mouse.up()
    assert (moving != before).any(), "before the button is released"
    assert np.abs(shown(tab) - conditional(tab)).max() <= 1
    if head not in ("structured", "heavy"):  # whose `condition` takes pins exactly
        tab.evaluate("sosvae.app.setTau(sosvae.app.doc.strokes[0].id, 0.1)")
    tab.evaluate("sosvae.app.view('scaled', {scales: [0.5, 1.5, 1, 0, 1]})")
    if head in ("structured", "heavy", "global-local"):
        assert np.abs(shown(tab) - conditional(tab, scales=[0.5, 1.5, 1, 0, 1])).max() <= 1
    tab.evaluate("sosvae.app.view('cold', {mode: 'sample', globalTemperature: 0, localTemperature: 0})")
    cold = shown(tab)
    tab.evaluate("sosvae.app.view('mean', {mode: 'mean'})")
    np.testing.assert_array_equal(cold, shown(tab))
    tab.evaluate("sosvae.app.view('local', {mode: 'sample', localTemperature: 1})")
    assert (shown(tab) != cold).any()
    panel(tab, "Look")
    tab.locator("#panel-look .facts", has_text="nats").wait_for()
    tab.evaluate("sosvae.app.goTo(1)")
    np.testing.assert_array_equal(shown(tab), before)


@pytest.mark.parametrize("head", ["precision", "global-local"])
def test_where_the_image_is_too_large_the_server_conditions_and_the_page_says_so(tab, server, head):  # noqa: F811
    open_run(tab, server, head)
    draw(tab, (5, 5), (9, 9))
    in_page = shown(tab)
    open_run(tab, server, head, by_server=True)
    tab.get_by_text(BY_SERVER).wait_for()
    rested(tab)
    before = shown(tab)
    draw(tab, (5, 5), (9, 9))
    rested(tab)
    assert np.abs(shown(tab) - in_page).max() <= 1
    tab.evaluate("sosvae.app.setTau(sosvae.app.doc.strokes[0].id, 0.2)")
    rested(tab)
    soft = shown(tab)
    assert np.abs(soft - conditional(tab)).max() <= 1
    assert np.abs(soft - in_page).max() > 1
    panel(tab, "Edit")
    until(tab, "document.querySelectorAll('#panel-edit .thumb canvas').length === 4")
    tab.get_by_text("not worked out where the server conditions").wait_for()
    press(tab, "s")
    rested(tab)
    sample = shown(tab)
    assert (sample != soft).any()
    press(tab, "n")
    rested(tab)
    assert (shown(tab) != sample).any()
    panel(tab, "Look")
    tab.get_by_role("radio", name="Deviation").click()
    tab.get_by_text("estimated from 64 samples. What is pinned is left out").wait_for()
    tab.get_by_role("radio", name="Image").click()
    tab.evaluate("sosvae.app.goTo(1)")
    np.testing.assert_array_equal(shown(tab), before)


def test_a_distribution_without_formulas_is_the_server_s(tab, server):  # noqa: F811
    def mean_alone(route):
        header, arrays = unpack(route.fetch().body())
        raw = pack(Prediction(arrays["loc"]), tuple(header["shape"]), code=header["code"], run=header["run"])
        route.fulfill(body=raw, content_type="application/octet-stream")

    tab.route("**/api/decode", mean_alone)
    open_run(tab, server, "structured")
    tab.get_by_text(BY_SERVER).wait_for()
    before = shown(tab)
    draw(tab, (5, 5), (9, 9))
    rested(tab)
    assert np.abs(shown(tab) - conditional(tab)).max() <= 1
    assert (shown(tab) != before).sum() > 50
    panel(tab, "Look")
    tab.locator("#panel-look .facts", has_text="nats").wait_for()
    tab.get_by_role("radio", name="Covariance").click()
    tab.get_by_text("The page has no formulas for this distribution").wait_for()
    tab.get_by_role("radio", name="Image").click()
    tab.evaluate("sosvae.app.setTau(sosvae.app.doc.strokes[0].id, 0.2)")
    tab.get_by_text("this model takes pinned values exactly").wait_for()


def test_components_are_there_where_there_is_a_low_rank_part(tab, server):  # noqa: F811
    for head, count in (("global-local", 5), ("precision", 0)):
        open_run(tab, server, head)
        panel(tab, "Components")
        assert tab.locator("#panel-components li").count() == count
        assert tab.get_by_text("This model has no low-rank part").is_visible() == (count == 0)


def test_a_file_conditions_by_itself(folder, tab):  # noqa: F811
    path = folder / "page.html"
    export(Runs([folder / "runs" / "global-local"]), path, 1)
    tab.context.set_offline(True)
    tab.goto(path.as_uri())
    ready(tab)
    assert tab.locator(".banner.calm").is_hidden()
    before = shown(tab)
    draw(tab, (5, 5), (9, 9))
    assert (shown(tab) != before).sum() > 50
    tab.evaluate("sosvae.app.limit = 0")
    tab.evaluate("sosvae.app.shownKeys.main = ''; sosvae.app.refresh()")
    tab.get_by_text("the rest of the image does not follow an edit in a page without its server").wait_for()
