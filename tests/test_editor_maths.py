"""The page's mathematics, in a browser, against the float64 oracle in Python."""

import base64
from functools import cache

import numpy as np
import pytest
import torch
from editor_cases import chromium, ready, write_page  # noqa: F401  (a fixture)

from lowrank_mvn import LowRankMultivariateNormal
from sosvae.editor.parameters import Prediction, pack, predict

SMALL, LARGE = (1, 48, 40), (3, 218, 178)
GREY_LEVEL = 1 / 255

# One call does an edit and reads everything off; arrays travel in base64.
EDIT = """
({raw, d, key, strokes, scales, index}) => {
  const {Parameters, Pins, Posterior, logDensity} = sosvae.core;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const text = (array) => {
    const u = new Uint8Array(array.buffer); let s = '';
    for (let i = 0; i < u.length; i += 32768) s += String.fromCharCode(...u.subarray(i, i + 32768));
    return btoa(s);
  };
  const models = globalThis.models ??= {};
  const read = models[key] ??= Parameters.read(bytes(raw));
  const {channels, height, width, loc, B, R} = read;
  const p = new Parameters(channels, height, width, loc, B, R, new Float32Array(bytes(d)));
  const pins = new Pins(p);
  for (const {tau, indices, values} of strokes) {
    pins.begin(tau);
    const at = new Int32Array(bytes(indices)), b = new Float32Array(bytes(values));
    for (let i = 0; i < at.length; i++) pins.put(at[i], b[i]);
  }
  const a = scales ?? new Array(p.R).fill(1);
  const posterior = new Posterior(p, pins, a);
  const image = posterior.image(posterior.coefficients(), new Float32Array(p.N));
  const result = {
    image: text(image),
    deviation: text(posterior.standardDeviation(new Float32Array(p.N))),
    row: text(posterior.covarianceRow(index, new Float32Array(p.N))),
    density: logDensity(p, image, a),
    surprise: posterior.surprise(),
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
    key = f"{hash(prediction.loc.tobytes() + prediction.factor.tobytes())} {precision}"
    arguments = {"key": key, "d": text(prediction.d), "strokes": packed, "index": index, "scales": scales}
    if not core.evaluate("(key) => !!globalThis.models?.[key]", key):
        arguments["raw"] = base64.b64encode(pack(prediction, shape, precision)).decode()
    result = core.evaluate(EDIT, arguments)
    for name in ("image", "deviation", "row"):
        result[name] = torch.frombuffer(bytearray(base64.b64decode(result[name])), dtype=torch.float32).double()
    return result


@cache
def basis(shape, R, columns):
    """Of the model below with d = 1, which its basis does not hang on."""
    return predict(model(shape, R, 1.0, columns))


def model(shape, R, d, columns="independent"):
    """N(μ, PPᵀ + d·I) in float32, smooth enough to look like an image, as a batch of one."""
    N = int(np.prod(shape))
    g = torch.Generator().manual_seed(1)
    P = 0.2 * torch.randn(1, N, R, generator=g)
    if columns == "nearly collinear":
        P = P[..., :1] + 1e-3 * P
    return LowRankMultivariateNormal(torch.rand(1, N, generator=g), P, torch.tensor(d), validate_args=False)


def pinned(N, kind):
    g = np.random.default_rng(2)
    count = {"one": 1, "a stroke": 200, "all but one": N - 1}[kind]
    return np.sort(g.permutation(N)[:count])


@pytest.mark.parametrize("kind", ["one", "a stroke", "all but one"])
@pytest.mark.parametrize("d", [1e-5, 1.0])
@pytest.mark.parametrize(
    ("shape", "R", "columns"),
    [(SMALL, 10, "independent"), (SMALL, 10, "nearly collinear"), (LARGE, 25, "independent")],
    ids=["48x40", "48x40 collinear", "218x178x3"],
)
def test_conditional_density_and_covariance(core, shape, R, columns, d, kind):
    """Of `p.condition`, `covariance_row` and `log_prob` in float64."""
    p = model(shape, R, d, columns)
    N = p.event_shape[0]
    at = pinned(N, kind)
    values = np.random.default_rng(3).random(len(at)).astype(np.float32)
    index = int(np.setdiff1d(np.arange(N), at[: N - 1])[0])
    prediction = basis(shape, R, columns)._replace(d=np.array([d], np.float32))
    result = edit(core, prediction, shape, [(0.0, at, values)], index)

    oracle = LowRankMultivariateNormal(
        p.loc.double(), p.cov_factor.double(), torch.tensor(d).double(), validate_args=False
    )
    observed = torch.zeros(N, dtype=torch.bool)
    observed[torch.from_numpy(at)] = True
    edited = oracle.loc.clone()
    edited[0, torch.from_numpy(at)] = torch.from_numpy(values).double()
    conditional = oracle.condition(edited, observed)
    assert (result["image"] - conditional.loc[0]).abs().max() < GREY_LEVEL
    row = conditional.covariance_row(index)[0]
    assert (result["row"] - row).abs().max() < 1e-3 * row.abs().max()
    deviation = conditional.variance[0].sqrt()
    assert (result["deviation"] - deviation).abs().max() < 1e-3 * deviation.max()
    density = oracle.log_prob(result["image"][None]).item()
    assert result["density"] == pytest.approx(density, rel=1e-3)
    assert result["left"] == 0


@pytest.mark.parametrize("scaled", [False, True], ids=["the model", "scaled components"])
@pytest.mark.parametrize("learned", [False, True], ids=["one d", "d per pixel"])
def test_soft_pins_against_dense_algebra(core, learned, scaled):
    """Strokes of different firmness, the later one over part of the earlier, against Σ itself."""
    shape, R = (3, 8, 9), 6
    N = int(np.prod(shape))
    g = torch.Generator().manual_seed(4)
    P = 0.3 * torch.randn(1, N, R, generator=g)
    d = 0.001 + 0.01 * torch.rand(1, N, generator=g) if learned else torch.tensor(2e-3)
    p = LowRankMultivariateNormal(torch.rand(1, N, generator=g), P, d, validate_args=False)
    prediction = predict(p)
    scales = [2.0, 0.5, 1.0, 0.0, 1.5, 1.0] if scaled else None
    strokes = [(0.1, np.arange(0, 40), np.full(40, 0.9)), (0.0, np.arange(30, 50), np.full(20, 0.1))]
    index = 35
    result = edit(core, prediction, shape, strokes, index, scales)

    B = torch.from_numpy(prediction.factor).double().T * torch.tensor(scales or [1.0] * R).double()
    variance = torch.from_numpy(prediction.d).double().expand(N)
    sigma = B @ B.T + torch.diag(variance)
    at = torch.arange(50)
    tau2 = torch.cat([torch.full((30,), 0.1**2), torch.zeros(20)]).double()
    b = torch.cat([torch.full((30,), 0.9), torch.full((20,), 0.1)]).double()
    loc = torch.from_numpy(prediction.loc).double()
    gain = torch.linalg.solve(sigma[at][:, at] + torch.diag(tau2), sigma[at]).T
    assert (result["image"] - (loc + gain @ (b - loc[at]))).abs().max() < 1e-5
    posterior = sigma - gain @ sigma[at]
    assert (result["row"] - posterior[index]).abs().max() < 1e-6
    assert (result["deviation"] ** 2 - posterior.diagonal().clamp_min(0)).abs().max() < 1e-6
    delta = b - loc[at]
    q = delta @ torch.linalg.solve(sigma[at][:, at] + torch.diag(tau2), delta)
    assert result["surprise"]["mahalanobis"] == pytest.approx(q.item(), rel=1e-4)
    assert result["surprise"]["count"] == 50
    assert result["density"] == pytest.approx(
        torch.distributions.MultivariateNormal(loc, sigma).log_prob(result["image"]).item(), rel=1e-4
    )
    assert result["left"] == 0


def test_samples_have_the_conditional_covariance(core):
    """ω = ω̂ + L₂⁻ᵀε with ε standard normal: the covariance of what it draws is that of the posterior."""
    p = model((1, 16, 16), 4, 1e-3)
    raw = base64.b64encode(pack(predict(p), (1, 16, 16))).decode()
    covariance = core.evaluate(
        """(raw) => {
          const {Parameters, Pins, Posterior, normals} = sosvae.core;
          const p = Parameters.read(Uint8Array.from(atob(raw), (c) => c.charCodeAt(0)).buffer);
          const pins = new Pins(p); pins.begin(0); pins.put(3, 1); pins.put(40, 0);
          const posterior = new Posterior(p, pins, [1, 1, 1, 1]);
          const y = new Float32Array(p.N); let sum = 0, square = 0; const count = 4000;
          for (let s = 0; s < count; s++) {
            posterior.image(posterior.coefficients(normals(s, 4)), y, normals(s + 1e6, p.N));
            sum += y[200]; square += y[200] ** 2;
          }
          const row = posterior.covarianceRow(200, new Float32Array(p.N));
          return [square / count - (sum / count) ** 2, row[200]];
        }""",
        raw,
    )
    assert covariance[0] == pytest.approx(covariance[1], rel=0.1)


def test_float16_is_off_by_what_it_says(core):
    shape = (1, 48, 40)
    p = model(shape, 10, 1e-5, "nearly collinear")
    prediction = predict(p)
    at, values = np.arange(100), np.full(100, 0.5, np.float32)
    full = edit(core, prediction, shape, [(0.05, at, values)], 500)
    half = edit(core, prediction, shape, [(0.05, at, values)], 500, precision="float16")
    assert (full["image"] - half["image"]).abs().max() < GREY_LEVEL
