"""The editor in a real browser: answers that come in pieces, a server that dies, strangers."""

import re

from editor_cases import (  # noqa: F401  (fixtures among them)
    chromium,
    draw,
    folder,
    ready,
    server,
    serving,
    shown,
    spot,
    tab,
    until,
)

STALLED = """
(() => {
  const original = fetch;
  globalThis.fetch = async (address, init) => {
    const answer = await original(address, init);
    if (!String(address).includes('decode') || globalThis.whole) return answer;
    const bytes = new Uint8Array(await answer.arrayBuffer());
    const body = new ReadableStream({start(parts) {
      for (let i = 0; i < HAVE; i += 1000) parts.enqueue(bytes.slice(i, Math.min(i + 1000, HAVE)));
      globalThis.rest = () => { parts.enqueue(bytes.slice(HAVE)); parts.close(); };
      globalThis.cut = () => parts.close();
    }});
    return new Response(body, {headers: {'content-length': String(bytes.length)}});
  };
})()
""".replace("HAVE", "6000")


def test_the_mean_is_shown_while_its_factor_is_on_its_way(tab, server):  # noqa: F811
    tab.add_init_script(STALLED)
    tab.goto(server)
    until(tab, "!!globalThis.sosvae && sosvae.app.frame !== null")
    assert tab.evaluate("sosvae.app.loaded === null && sosvae.app.busy")
    before = tab.evaluate("sosvae.app.frame.main.rgba.join()")
    x, y = spot(tab, 5, 5)
    tab.mouse.click(x, y)
    tab.evaluate("rest()")
    ready(tab)
    assert tab.evaluate("sosvae.app.frame.main.rgba.join()") == before
    assert tab.evaluate("sosvae.app.ready > sosvae.app.firstImage")
    draw(tab, (5, 5), (9, 9))
    assert tab.evaluate("sosvae.app.frame.main.rgba.join()") != before


def test_an_answer_that_breaks_off_is_said_to(tab, server):  # noqa: F811
    tab.add_init_script(STALLED)
    tab.goto(server)
    until(tab, "!!globalThis.cut")
    tab.evaluate("cut()")
    tab.get_by_text("the server stopped in the middle of an answer").wait_for()
    assert tab.evaluate("sosvae.app.loaded") is None
    tab.evaluate("whole = true")
    tab.get_by_label("Seed", exact=True).fill("1")
    tab.keyboard.press("Enter")
    ready(tab)


# --- A server that dies, and strangers ------------------------------------------------------------------------


def test_a_server_that_dies_and_comes_back(tab, folder):  # noqa: F811
    kept = {"SOSVAE_EDIT_TOKEN": "kept-token"}
    with serving(folder / "runs" / "sos", env=kept) as (address, _):
        tab.goto(address)
        ready(tab)
    before = shown(tab)
    draw(tab, (5, 5), (9, 9))
    assert (shown(tab) != before).any(), "what is loaded goes on working"
    tab.get_by_label("Seed", exact=True).fill("3")
    tab.keyboard.press("Enter")
    tab.get_by_text("The server does not answer. What is loaded goes on working").wait_for()
    assert tab.evaluate("sosvae.app.doc.strokes.length") == 1
    assert tab.evaluate("sosvae.app.doc.code.seed") == 0, "the state is that of the picture"
    port = int(re.search(r":(\d+)/", address)[1])
    with serving(folder / "runs" / "sos", port=port, env=kept):
        tab.get_by_text("The server is back").wait_for()
        tab.get_by_label("Seed", exact=True).fill("4")
        tab.keyboard.press("Enter")
        until(tab, "sosvae.app.loaded.header.code.seed === 4")
        tab.route("**/api/**", lambda route: route.fulfill(status=403, body="another token"))
        tab.get_by_label("Seed", exact=True).fill("5")
        tab.keyboard.press("Enter")
        tab.locator(".banner", has_text="The server was started anew").wait_for()


def test_a_wrong_token_opens_nothing(tab, server):  # noqa: F811
    answer = tab.goto(server[:-3] + "xyz")
    assert answer.status == 403
    assert "token" in tab.inner_text("body")


def test_another_site_cannot_reach_the_server(tab, server, tmp_path):  # noqa: F811
    """From a file (Origin: null), with the very address and token."""
    (tmp_path / "stranger.html").write_text("<p>hello", encoding="utf-8")
    tab.goto((tmp_path / "stranger.html").as_uri())
    base, token = server.split("?token=")
    result = tab.evaluate(
        "([base, token]) => fetch(base + 'api/runs', {headers: {'x-token': token}})"
        ".then((r) => r.status, () => 'refused')",
        [base, token],
    )
    assert result in ("refused", 403)
    status = tab.evaluate(
        "([base]) => fetch(base + 'api/runs', {mode: 'no-cors'}).then((r) => r.type + r.status, () => 'refused')",
        [base],
    )
    assert status in ("refused", "opaque0")


def test_behind_a_proxy_under_a_sub_path(tab, folder):  # noqa: F811
    with serving(folder / "runs" / "sos", options=("--allowed-host", "lab.example")) as (address, _):
        base, query = address.split("?")

        def forward(route):
            path = route.request.url.removeprefix("http://lab.example/people/me/")
            route.fulfill(response=route.fetch(url=base + path))

        tab.route("http://lab.example/people/me/**", forward)
        tab.goto(f"http://lab.example/people/me/?{query}")
        ready(tab)
        tab.get_by_label("Seed", exact=True).fill("3")
        tab.keyboard.press("Enter")
        until(tab, "sosvae.app.loaded.header.code.seed === 3")


def test_nothing_comes_from_elsewhere(tab, server):  # noqa: F811
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(server)
    ready(tab)
    base = server.split("?")[0]
    assert all(url.startswith((base, "blob:", "data:")) for url in asked), asked
