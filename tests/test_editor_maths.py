"""The page's mathematics, in a browser, against the float64 oracle in Python."""

import base64
from functools import cache

import numpy as np
import pytest
import torch
from editor_cases import chromium  # noqa: F401  (a fixture)
from editor_maths_cases import core, edit  # noqa: F401  (a fixture)

from lowrank_mvn import LowRankMultivariateNormal, LowRankMultivariateStudentT
from sosvae.editor.parameters import pack, predict

SMALL, LARGE = (1, 48, 40), (3, 218, 178)
GREY_LEVEL = 1 / 255


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
def test_conditional_density_and_covariance(core, shape, R, columns, d, kind):  # noqa: F811
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
def test_soft_pins_against_dense_algebra(core, learned, scaled):  # noqa: F811
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


def test_samples_have_the_conditional_covariance(core):  # noqa: F811
    """ω = ω̂ + L₂⁻ᵀε with ε standard normal: the covariance of what it draws is that of the posterior."""
    p = model((1, 16, 16), 4, 1e-3)
    raw = base64.b64encode(pack(predict(p), (1, 16, 16))).decode()
    covariance = core.evaluate(
        """(raw) => {
          const {Parameters, Pins, posteriorOf, normals} = sosvae.core;
          const p = Parameters.read(Uint8Array.from(atob(raw), (c) => c.charCodeAt(0)).buffer);
          const pins = new Pins(p); pins.begin(0); pins.put(3, 1); pins.put(40, 0);
          const posterior = posteriorOf(p, pins, [1, 1, 1, 1]);
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


@pytest.mark.parametrize("df", [2.5, 40.0, 1e6])
def test_student_t(core, df):  # noqa: F811
    """Of `condition`, `covariance_row`, `variance` and `log_prob` of the t in Python."""
    normal = model(SMALL, 10, 1e-3)
    p = LowRankMultivariateStudentT(df, normal.loc.double(), normal.cov_factor.double(), 1e-3, validate_args=False)
    N = p.event_shape[0]
    at, values = pinned(N, "a stroke"), np.random.default_rng(3).random(200).astype(np.float32)
    index = int(np.setdiff1d(np.arange(N), at)[0])
    result = edit(core, predict(p), SMALL, [(0.0, at, values)], index)
    observed = torch.zeros(N, dtype=torch.bool)
    observed[torch.from_numpy(at)] = True
    edited = p.loc.clone()
    edited[0, torch.from_numpy(at)] = torch.from_numpy(values).double()
    conditional = p.condition(edited, observed)
    assert (result["image"] - conditional.loc[0]).abs().max() < GREY_LEVEL
    row, deviation = conditional.covariance_row(index)[0], conditional.variance[0].sqrt()
    assert (result["row"] - row).abs().max() < 1e-3 * row.abs().max()
    assert (result["deviation"] - deviation).abs().max() < 1e-3 * deviation.max()
    assert result["density"] == pytest.approx(p.log_prob(result["image"][None]).item(), rel=1e-6)
    unpinned = edit(core, predict(p), SMALL, [], index)
    torch.testing.assert_close(unpinned["deviation"].square(), p.variance[0], rtol=1e-4, atol=0)


def test_what_widens_a_sample_of_a_t_is_chi_square(core):  # noqa: F811
    for df in (1.0, 4.0, 60.0):
        drawn = core.evaluate(
            "(df) => { let a = 0, b = 0; for (let s = 0; s < 20000; s++) {"
            " const x = sosvae.core.chiSquare(s, df); a += x; b += x * x; } return [a / 20000, b / 20000]; }",
            df,
        )
        assert drawn[0] == pytest.approx(df, rel=5 * np.sqrt(2 / df / 20000))
        assert drawn[1] - drawn[0] ** 2 == pytest.approx(2 * df, rel=0.15 if df > 2 else 0.3)


def test_float16_is_off_by_what_it_says(core):  # noqa: F811
    shape = (1, 48, 40)
    p = model(shape, 10, 1e-5, "nearly collinear")
    prediction = predict(p)
    at, values = np.arange(100), np.full(100, 0.5, np.float32)
    full = edit(core, prediction, shape, [(0.05, at, values)], 500)
    half = edit(core, prediction, shape, [(0.05, at, values)], 500, precision="float16")
    assert (full["image"] - half["image"]).abs().max() < GREY_LEVEL
