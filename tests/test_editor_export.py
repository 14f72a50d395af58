"""The page that is one file: from a disk, without a network."""

import re

import numpy as np
import pytest
from editor_cases import chromium, draw, make_images, make_run, ready, shown, tab, until  # noqa: F401  (fixtures)

from sosvae.cli import main
from sosvae.editor.export import export
from sosvae.editor.runs import Runs


@pytest.fixture(scope="module")
def folder(editor_folder):
    return editor_folder


def test_the_file_needs_nothing_else(folder, capsys):
    path = folder / "page.html"
    assert main(["edit", str(folder / "runs" / "sos"), "--export", str(path), "--codes", "3"]) == 0
    assert "3 codes" in capsys.readouterr().out
    text = path.read_text(encoding="utf-8")
    assert str(folder) not in text, "nothing of this machine is in it"
    program = re.sub(r'<script type="application/octet-stream".*?</script>', "", text, flags=re.S)
    assert "WebAssembly" not in program
    assert not re.search(r"<script[^>]*\bsrc=|<link[^>]*stylesheet|@import|import\(", program)
    assert not re.search(r"https?://(?!www\.w3\.org/)", program)


def test_fewer_held_out_images_than_codes(folder, tmp_path):
    assert export(Runs([folder / "runs"]), tmp_path / "page.html", 9)["codes"] == 9
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"kind": "heldout"' in text
    assert '"kind": "seed"' in text
    assert 'data-parameters="1-8"' in text


def test_errors(folder):
    with pytest.raises(ValueError, match="codes is 0"):
        export(Runs([folder / "runs"]), folder / "x.html", 0)
    assert main(["edit", str(folder / "images")]) == 1


def test_without_the_data_codes_are_from_the_prior(tmp_path):
    images = make_images(tmp_path / "images")
    make_run(tmp_path / "run", images)
    for file in images.glob("*.png"):
        file.unlink()
    export(Runs([tmp_path / "run"]), tmp_path / "page.html", 2)
    assert '"kind": "seed", "seed": 1' in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("head", ["structured", "global-local"])
def test_size_of_a_file_of_eight_codes(tmp_path, head):
    """At 48×40 and R = 10; the page itself included."""
    images = make_images(tmp_path / "images", size=(48, 40))
    make_run(tmp_path / "run", images, size=(48, 40), rank=10, head=head)
    assert export(Runs([tmp_path / "run"]), tmp_path / "page.html", 8)["bytes"] <= 1_000_000


def test_it_works_from_a_disk(folder, tab):  # noqa: F811
    path = folder / "both.html"
    export(Runs([folder / "runs" / "sos", folder / "runs" / "beta"]), path, 2)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.context.set_offline(True)
    tab.goto(path.as_uri())
    ready(tab)
    first = shown(tab)
    draw(tab, (5, 5), (9, 9))
    assert (shown(tab) != first).sum() > 20
    tab.keyboard.press("Control+z")
    np.testing.assert_array_equal(shown(tab), first)
    tab.locator("[aria-label='Codes in this file'] button").last.click()
    ready(tab)
    until(tab, "sosvae.app.loaded.header.code.index > 0")
    assert (shown(tab) != first).any()
    tab.get_by_text("The reconstruction is off by").wait_for()
    tab.get_by_role("tab", name="Compare").click()
    tab.locator("#panel-compare select").select_option("beta")
    until(tab, "!!sosvae.app.frame.other")
    assert all(url.startswith(("file:", "blob:", "data:")) for url in asked), asked
    assert sum(url.startswith("file:") for url in asked) == 1


def test_a_link_to_a_code_that_is_not_in_the_file_opens_it_all_the_same(folder, tab):  # noqa: F811
    path = folder / "one.html"
    export(Runs([folder / "runs" / "sos"]), path, 1)
    tab.goto(path.as_uri())
    ready(tab)
    first = shown(tab)
    tab.evaluate(
        """async () => {
          const {app} = sosvae;
          const session = {format: 'sosvae-edit', version: 1, doc: {...app.doc, code: {kind: 'heldout', index: 99}}};
          const stream = new Blob([JSON.stringify(session)]).stream().pipeThrough(new CompressionStream('deflate-raw'));
          const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
          const text = btoa(String.fromCharCode(...bytes));
          globalThis.name = text.replace(/\\+/g, '-').replace(/\\//g, '_').replace(/=+$/, '');
        }"""
    )
    link = tab.evaluate("globalThis.name")
    tab.goto("about:blank")
    tab.goto(f"{path.as_uri()}#s={link}")
    tab.get_by_text("This file holds a few codes only").wait_for()
    ready(tab)
    np.testing.assert_array_equal(shown(tab), first)
