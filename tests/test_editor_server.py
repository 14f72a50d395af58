"""The server of the editor: who may ask, what is answered, and what strangers' files meet."""

import io
import json
import signal
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from editor_cases import HOST, TOKEN, Client, make_images, make_run, serving
from PIL import Image

from sosvae.editor import uploads
from sosvae.editor.parameters import unpack
from sosvae.editor.runs import CodeError, Runs

pytest.importorskip("starlette", reason="the extra sosvae[app] is not installed")
from sosvae.editor.server import create_app, listen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("editor")
    images = make_images(root / "images", channels=3)
    make_run(root / "runs" / "structured", images, channels=3)
    make_run(root / "runs" / "pixelwise", images, head="pixelwise", channels=3)
    return root


@pytest.fixture(scope="module")
def runs(folder):
    return Runs([folder / "runs"])


@pytest.fixture(scope="module")
def call(runs):
    return Client(create_app(runs, TOKEN))


def decode(call, code, run="structured", **more):
    status, raw, _ = call("POST", "/api/decode", json.dumps({"run": run, "code": code, **more}).encode())
    return status, raw


# --- Who may ask ----------------------------------------------------------------------------------------------


def test_the_page_comes_with_the_token_in_its_address(call):
    status, raw, headers = call("GET", f"/?token={TOKEN}", token=None)
    assert status == 200
    assert b"sosvae" in raw
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("token", [None, "", "a-toke", "a-token2", "ä"])
@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/health"])
def test_without_the_token_nothing_is_answered(call, token, path):
    status, raw, _ = call("GET", path, token=token)
    assert status == 403
    assert b"token" in raw


def test_the_token_in_the_address_opens_the_page_only(call):
    assert call("GET", f"/api/runs?token={TOKEN}", token=None)[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8642", "", "127.0.0.1.evil.example", "192.168.0.7"])
def test_a_foreign_host_is_refused(call, host):
    assert call("GET", "/api/runs", headers={"host": host})[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8642", "localhost:8642", "[::1]:8642"])
def test_this_machine_is_known_by_its_names(call, host):
    assert call("GET", "/api/runs", headers={"host": host})[0] == 200


@pytest.mark.parametrize("origin", ["null", "http://evil.example", "http://127.0.0.1:9999", "file://", "https://", ""])
def test_a_foreign_origin_is_refused(call, origin):
    assert call("GET", "/api/runs", headers={"origin": origin})[0] == 403
    assert call("POST", "/api/decode", b"{}", headers={"origin": origin})[0] == 403


def test_its_own_origin_is_not_foreign(call):
    assert call("GET", "/api/runs", headers={"origin": f"http://{HOST}"})[0] == 200


def test_a_proxy_is_known_where_it_is_named(runs):
    call = Client(create_app(runs, TOKEN, allowed_hosts=["lab.example"]))
    assert call("GET", "/api/runs", headers={"host": "lab.example", "origin": "https://lab.example"})[0] == 200
    assert call("GET", "/api/runs", headers={"host": HOST, "origin": "https://lab.example"})[0] == 200
    assert call("GET", "/api/runs", headers={"host": HOST, "origin": "https://other.example"})[0] == 403


def test_listening_for_the_network_answers_to_numbers_not_to_names(runs):
    call = Client(create_app(runs, TOKEN, host="0.0.0.0"))
    assert call("GET", "/api/runs", headers={"host": "192.168.0.7:8642"})[0] == 200
    assert call("GET", "/api/runs", headers={"host": "evil.example:8642"})[0] == 403


# --- What is answered -----------------------------------------------------------------------------------------


def test_runs_are_listed_without_paths(call, folder):
    status, raw, _ = call("GET", "/api/runs")
    assert status == 200
    rows = json.loads(raw)
    assert sorted(row["name"] for row in rows) == ["pixelwise", "structured"]
    assert str(folder) not in raw.decode()


@pytest.mark.parametrize(
    "name", ["../structured", "structured/..", "/etc", "..", "", "structured/config.json", "STRUCTURED"]
)
def test_a_run_is_looked_up_never_opened_as_a_path(call, name):
    status, raw = decode(call, {"kind": "seed", "seed": 0}, run=name)
    assert status == 404
    assert b"there is no run" in raw


@pytest.mark.parametrize("path", ["/../setup.py", "/static/page.js", "/api/../../etc/passwd", "/api/save/../x"])
def test_there_are_no_files_to_be_had(call, path):
    assert call("GET", path)[0] in (404, 405)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_code_s_parameters_are_those_of_the_decoder(call, runs, precision):
    status, raw = decode(call, {"kind": "seed", "seed": 5}, precision=precision)
    assert status == 200
    header, arrays = unpack(raw)
    vae = runs.model("structured")
    with torch.no_grad():
        p = vae.decode(torch.randn(1, vae.latents, generator=torch.Generator().manual_seed(5)))
    assert header["shape"] == [3, 24, 20]
    np.testing.assert_allclose(arrays["loc"], p.loc[0].numpy(), atol=1e-3 if precision == "float16" else 1e-6)
    assert arrays["factor"].shape == (5, 3 * 24 * 20)


def test_codes_of_all_kinds(call, runs):
    seed, heldout = {"kind": "seed", "seed": 5}, {"kind": "heldout", "index": 0}
    vector = {"kind": "vector", "z": [0.1, 0.2, 0.3, 0.4]}
    mix = {"kind": "mix", "from": seed, "to": vector, "t": 0.5}
    for code in (heldout, vector, mix, {"kind": "mean of", "run": "structured", "code": mix}):
        for run in ("structured", "pixelwise"):
            status, raw = decode(call, code, run)
            assert status == 200, raw
    header, arrays = unpack(decode(call, heldout)[1])
    assert arrays["original"].shape == (3, 24, 20)
    ends = [unpack(decode(call, {**mix, "t": t})[1])[1]["loc"] for t in (0, 1)]
    np.testing.assert_allclose(ends[0], unpack(decode(call, seed)[1])[1]["loc"], atol=1e-5)
    np.testing.assert_allclose(ends[1], unpack(decode(call, vector)[1])[1]["loc"], atol=1e-5)
    assert header["head"] == "structured"
    assert "factor" not in unpack(decode(call, seed, "pixelwise")[1])[1]


@pytest.mark.parametrize(
    "code",
    [
        {}, {"kind": "file", "path": "/etc/passwd"}, {"kind": "seed"}, {"kind": "seed", "seed": "x"}, [], "seed", None,
        {"kind": "heldout", "index": 10**6}, {"kind": "heldout", "index": -1}, {"kind": "vector", "z": [1]},
        {"kind": "vector", "z": [float("nan")] * 4}, {"kind": "mix", "from": {}, "to": {}, "t": 0},
        {"kind": "mean of", "run": "../x", "code": {"kind": "seed", "seed": 0}}, {"kind": "seed", "seed": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_code_is_told_so(call, code):
    status, raw = decode(call, code)
    assert status == 404, raw


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_request_is_told_so(call, body):
    assert call("POST", "/api/decode", body)[0] == 400


def test_a_code_nested_without_end_is_refused_at_once(call):
    code = {"kind": "seed", "seed": 0}
    for _ in range(5):
        code = {"kind": "mix", "from": code, "to": code, "t": 0.5}
    status, raw = decode(call, code)
    assert status == 404
    assert b"deep" in raw


def test_held_out_images(call):
    status, raw, _ = call("GET", "/api/heldout?run=structured&count=4")
    assert status == 200
    header, arrays = unpack(raw)
    assert arrays["images"].shape == (len(header["indices"]), 3, 24, 20)
    assert arrays["images"].dtype == np.uint8
    assert call("GET", "/api/heldout?run=structured&count=x")[0] == 400


def test_a_conditional_worked_out_here(call, runs):
    """What pages ask for where they have no formulas: the same as `p.condition`."""
    code = {"kind": "seed", "seed": 1}
    asked = {"run": "structured", "code": code, "indices": [3, 500], "values": [1.0, 0.0]}
    status, raw, _ = call("POST", "/api/condition", json.dumps(asked).encode())
    assert status == 200
    image = unpack(raw)[1]["loc"]
    p = runs.distribution("structured", code)
    observed = torch.zeros(3 * 24 * 20, dtype=torch.bool)
    observed[[3, 500]] = True
    edited = p.loc.clone()
    edited[0, [3, 500]] = torch.tensor([1.0, 0.0])
    np.testing.assert_allclose(image, p.condition(edited, observed).loc[0].detach().numpy(), atol=1e-5)
    sampled = {**asked, "seed": 3}
    again = [unpack(call("POST", "/api/condition", json.dumps(sampled).encode())[1])[1]["loc"] for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert unpack(raw)[0]["log_density"] == pytest.approx(float(p.log_prob(torch.tensor(image)[None])), rel=1e-4)
    cold = {**sampled, "temperature": [0, 0]}
    np.testing.assert_allclose(
        unpack(call("POST", "/api/condition", json.dumps(cold).encode())[1])[1]["loc"], image, atol=1e-6
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"indices": [10**6]}, {"indices": [1, 2]}, {"indices": [-1]}, {"indices": [[3]]}, {"indices": "3"},
        {"indices": [10**30]}, {"values": [float("nan")]}, {"values": None}, {"values": [{}]}, {"variances": [-1]},
        {"variances": [1, 2]}, {"variances": [float("inf")]}, {"variances": [0.1]}, {"scales": [1]}, {"scales": "x"},
        {"seed": "x"}, {"seed": float("inf")}, {"seed": 1, "temperature": [1]}, {"seed": 1, "temperature": [1, -1]},
        {"seed": 1, "temperature": [1, float("nan")]}, {"seed": 1, "temperature": 3}, {"run": "../structured"},
        {"code": {"kind": "seed"}}, {"code": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_edit_is_told_so(call, wrong):
    asked = {"run": "structured", "code": {"kind": "seed", "seed": 1}, "indices": [3], "values": [1.0], **wrong}
    status, raw, _ = call("POST", "/api/condition", json.dumps(asked).encode())
    assert status == 404, raw
    assert raw


def test_saving_stays_in_the_run_s_folder(call, runs):
    png = io.BytesIO()
    Image.new("L", (4, 4)).save(png, "PNG")
    status, raw, _ = call("POST", "/api/save?run=structured&kind=png", png.getvalue())
    assert status == 200
    saved = runs.run("structured").folder / json.loads(raw)["file"]
    assert saved.parent.name == "edits"
    assert saved.read_bytes() == png.getvalue()
    assert call("POST", "/api/save?run=structured&kind=png", b"<svg/>")[0] == 400
    assert call("POST", "/api/save?run=structured&kind=html", b"<html>")[0] == 400
    assert call("POST", "/api/save?run=../structured&kind=png", png.getvalue())[0] == 404


# --- Strangers' files -----------------------------------------------------------------------------------------


def picture(size, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).convert(mode).save(
        file, kind, **options
    )
    return file.getvalue()


def bomb(width, height):
    """A PNG whose header promises more pixels than anybody should decode."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def encode(call, raw, run="structured"):
    return call("POST", f"/api/encode?run={run}", raw)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_upload_is_encoded(call, kind, mode):
    status, raw, _ = encode(call, picture((64, 48), kind, mode))
    assert status == 200
    header, arrays = unpack(raw)
    assert arrays["original"].shape == (3, 24, 20)
    assert header["code"]["kind"] == "vector"
    np.testing.assert_allclose(unpack(decode(call, header["code"])[1])[1]["loc"], arrays["loc"], atol=1e-3)


HOSTILE = {
    "empty": b"",
    "no image": b"hello",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "HTML": b"<!doctype html>",
    "GIF": b"GIF89a" + bytes(100),
    "truncated": picture((64, 48))[:300],
    "bomb": bomb(60_000, 60_000),
    "large": bomb(8000, 8000),
    "1×100000": bomb(1, 100_000),
    "100000×1": bomb(100_000, 1),
    "8×4000": bomb(8, 4000),
    "0×5": bomb(0, 5),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_with_a_sentence(call, name):
    status, raw, _ = encode(call, HOSTILE[name])
    assert status == 400, raw
    assert b"image" in raw
    assert b"Traceback" not in raw


def test_more_bytes_than_allowed_are_not_read(call, monkeypatch):
    monkeypatch.setattr("sosvae.editor.server.MAX_BYTES", 1000)
    assert encode(call, bytes(2000))[0] == 413


def test_exif_turns_the_image_and_stays_behind(call, runs):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010E] = "SECRET PLACE"
    raw = picture((40, 48), "JPEG", exif=exif)
    upright = uploads.read_image(raw, runs.run("structured").config.data)
    plain = uploads.read_image(picture((40, 48), "JPEG"), runs.run("structured").config.data)
    assert not np.array_equal(upright, plain)
    answer = encode(call, raw)[1]
    assert b"SECRET" not in answer


# --- Around it ------------------------------------------------------------------------------------------------


def test_a_run_without_its_data_has_no_held_out_images_and_goes_on(tmp_path):
    images = make_images(tmp_path / "images")
    make_run(tmp_path / "run", images)
    for file in images.glob("*.png"):
        file.unlink()
    runs = Runs([tmp_path / "run"])
    with pytest.raises(CodeError, match="cannot be read here"):
        runs.heldout("run", 4)
    assert unpack(runs.answer("run", {"kind": "seed", "seed": 0}))[0]["shape"] == [1, 24, 20]


def test_runs_of_one_name_are_told_apart(tmp_path):
    images = make_images(tmp_path / "images")
    for parent in ("a", "b"):
        make_run(tmp_path / parent / "run", images)
    assert Runs([tmp_path / "a", tmp_path / "b"]).names() == ["run", "b/run"]


def test_ctrl_c_ends_the_server_without_a_traceback(folder):
    with serving(folder / "runs" / "structured", stderr=subprocess.PIPE) as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_no_run_at_all():
    with pytest.raises(FileNotFoundError, match="no run was given"):
        Runs([])


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none"):
        Runs([tmp_path])


def test_a_port_that_is_taken(monkeypatch):
    first = listen("127.0.0.1", 0)
    first.listen()
    port = first.getsockname()[1]
    try:
        second = listen("127.0.0.1", port)
        assert second.getsockname()[1] != port
        second.close()
        with pytest.raises(OSError):  # noqa: PT011  (the system's words)
            listen("127.0.0.1", port, tries=1)
    finally:
        first.close()
