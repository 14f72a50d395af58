"""What the tests of the page's mathematics share: an edit in a browser, and everything that can be read off."""

import base64

import numpy as np
import pytest
import torch
from editor_cases import chromium, ready, write_page  # noqa: F401  (a fixture)

from sosvae.editor.parameters import Prediction, pack

# One call does an edit and reads everything off; arrays travel in base64.
EDIT = """
({raw, d, key, strokes, scales, index}) => {
  const {Parameters, Pins, posteriorOf, logDensity, normals} = sosvae.core;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const text = (array) => {
    const u = new Uint8Array(array.buffer); let s = '';
    for (let i = 0; i < u.length; i += 32768) s += String.fromCharCode(...u.subarray(i, i + 32768));
    return btoa(s);
  };
  const models = globalThis.models ??= {};
  const read = models[key] ??= Parameters.read(bytes(raw));
  const {channels, height, width, loc, B, R} = read;
  const own = () => new Float32Array(bytes(d));
  const p = d ? new Parameters(channels, height, width, loc, B, R, own(), {}, undefined, null, read.df) : read;
  const pins = new Pins(p);
  for (const {tau, indices, values} of strokes) {
    pins.begin(tau);
    const at = new Int32Array(bytes(indices)), b = new Float32Array(bytes(values));
    for (let i = 0; i < at.length; i++) pins.put(at[i], b[i]);
  }
  const a = scales ?? new Array(p.R).fill(1);
  const posterior = posteriorOf(p, pins, a);
  const image = posterior.image(posterior.coefficients(), new Float32Array(p.N));
  const result = {
    image: text(image),
    deviation: text(posterior.standardDeviation(new Float32Array(p.N))),
    row: text(posterior.covarianceRow(index, new Float32Array(p.N))),
    density: logDensity(p, image, a),
    surprise: posterior.surprise(),
    noisy: text(posterior.image(posterior.coefficients(), new Float32Array(p.N), normals(7, p.N), 0.5)),
    omega: text(normals(7, p.N)),
  };
  while (pins.strokes.length) pins.pop();
  result.left = Math.max(0, ...pins.sums.S.map(Math.abs), ...pins.sums.h.map(Math.abs));
  return result;
}
"""


@pytest.fixture(scope="module")
def core(chromium, tmp_path_factory):  # noqa: F811
    """A page for its mathematics alone."""
    folder = tmp_path_factory.mktemp("core")
    raw = pack(Prediction(np.zeros(4, np.float32), None, np.ones(1, np.float32)), (1, 2, 2))
    page = chromium.new_page()
    page.goto(write_page(folder, raw, (1, 2, 2), 0))
    ready(page)
    yield page
    page.close()


def edit(core, prediction, shape, strokes, index, scales=None, precision="float32"):
    """What the page makes of an edit. The large arrays travel once for each model."""

    def text(array):
        return base64.b64encode(array.tobytes()).decode()

    packed = [
        {"tau": tau, "indices": text(at.astype(np.int32)), "values": text(values.astype(np.float32))}
        for tau, at, values in strokes
    ]
    factor = b"" if prediction.factor is None else prediction.factor.tobytes()
    weights = b"".join(array.tobytes() for array in (prediction.stencil or {}).values())
    key = f"{hash(prediction.loc.tobytes() + factor + weights)} {prediction.df} {precision}"
    d = None if prediction.d is None else text(prediction.d)
    arguments = {"key": key, "d": d, "strokes": packed, "index": index, "scales": scales}
    if not core.evaluate("(key) => !!globalThis.models?.[key]", key):
        arguments["raw"] = base64.b64encode(pack(prediction, shape, precision)).decode()
    result = core.evaluate(EDIT, arguments)
    for name in ("image", "deviation", "row", "noisy", "omega"):
        result[name] = torch.frombuffer(bytearray(base64.b64decode(result[name])), dtype=torch.float32).double()
    return result
