"""The page's mathematics under a sparse precision, against dense algebra and against `p.condition`."""

import numpy as np
import pytest
import torch
from editor_cases import chromium  # noqa: F401  (a fixture)
from editor_maths_cases import core, edit  # noqa: F401  (a fixture)

from lowrank_mvn import GlobalLocalNormal, Stencil, StencilMultivariateNormal
from sosvae.editor.parameters import pack, predict, unpack

# (id, channels, H, W, side of the neighbourhood, stencils, ties): ragged first.
CASES = {
    "grey": (1, 7, 9, 3, 1, None),
    "5x5": (1, 9, 7, 5, 1, None),
    "own stencils, tied at each pixel": (3, 5, 4, 3, 3, "pixel"),
    "one stencil, tied alike": (3, 4, 6, 3, 1, "one"),
    "untied": (3, 4, 5, 3, 3, None),
}


def distribution(case, R, seed=5):
    """N(μ, (TTᵀ)⁻¹) or, where R > 0, N(μ, PPᵀ + (TTᵀ)⁻¹), a batch of one in float32."""
    channels, H, W, side, stencils, ties = case
    g = torch.Generator().manual_seed(seed)
    later = (side**2 - 1) // 2
    log_t = 2 + 0.3 * torch.randn(1, stencils, H, W, generator=g)
    s = -0.3 + 0.2 * torch.randn(1, stencils, later, H, W, generator=g)
    pairs = channels * (channels - 1) // 2
    m = {
        None: None,
        "pixel": 0.3 * torch.randn(1, pairs, H, W, generator=g),
        "one": 0.3 * torch.randn(pairs, 1, 1, generator=g),
    }[ties]
    stencil = Stencil(log_t, s, m, (side, side), channels)
    N = channels * H * W
    loc = torch.rand(1, N, generator=g)
    if R == 0:
        return StencilMultivariateNormal(loc, stencil)
    return GlobalLocalNormal(loc, 0.3 * torch.randn(1, N, R, generator=g), stencil)


@pytest.mark.parametrize("R", [0, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_dense_algebra(core, case, R):  # noqa: F811
    """Strokes of different firmness, the later one over part of the earlier, with scaled components."""
    p = distribution(case, R)
    prediction, shape = predict(p), case[:3]
    N = int(np.prod(shape))
    scales = [2.0, 0.5, 1.0, 0.0][:R]
    strokes = [(0.1, np.arange(0, 20), np.full(20, 0.9)), (0.0, np.arange(15, 30), np.full(15, 0.1))]
    free, soft = N - 7, 5
    result = edit(core, prediction, shape, strokes, free, scales)

    T = torch.linalg.inv(torch.stack([p.stencil.double().colour(e, "aten")[0] for e in torch.eye(N).double()]))
    local = torch.linalg.inv(T @ T.T)
    B = torch.zeros(N, 0).double() if R == 0 else torch.from_numpy(prediction.factor).double().T * torch.tensor(scales)
    sigma = B @ B.T + local
    at = torch.arange(30)
    tau2 = torch.cat([torch.full((15,), 0.1**2), torch.zeros(15)]).double()
    b = torch.cat([torch.full((15,), 0.9), torch.full((15,), 0.1)]).double()
    loc = torch.from_numpy(prediction.loc).double()
    gain = torch.linalg.solve(sigma[at][:, at] + torch.diag(tau2), sigma[at]).T
    assert (result["image"] - (loc + gain @ (b - loc[at]))).abs().max() < 1e-5
    posterior = sigma - gain @ sigma[at]
    assert (result["row"] - posterior[free]).abs().max() < 1e-6
    assert (edit(core, prediction, shape, strokes, soft, scales)["row"] - posterior[soft]).abs().max() < 1e-6
    assert (result["deviation"] ** 2 - posterior.diagonal().clamp_min(0)).abs().max() < 1e-6
    delta = b - loc[at]
    q = delta @ torch.linalg.solve(sigma[at][:, at] + torch.diag(tau2), delta)
    assert result["surprise"]["mahalanobis"] == pytest.approx(q.item(), rel=1e-4)
    density = torch.distributions.MultivariateNormal(loc, sigma).log_prob(result["image"]).item()
    assert result["density"] == pytest.approx(density, rel=1e-4, abs=1e-3)
    # What noise adds to the mean has the covariance that pins leave of the local part.
    root = (result["noisy"] - result["image"]) / 0.5
    left = ~torch.isin(torch.arange(N), at[15:])
    precision = (T @ T.T + torch.diag(torch.cat([1 / tau2[:15], torch.zeros(N - 15)])))[left][:, left]
    assert (root[~left] == 0).all()
    assert float(root[left] @ precision @ root[left]) == pytest.approx(
        float(result["omega"][left].square().sum()), rel=1e-4
    )


def test_with_nothing_pinned_it_is_the_model(core):  # noqa: F811
    p = distribution(CASES["own stencils, tied at each pixel"], 4)
    result = edit(core, predict(p), (3, 5, 4), [], 11)
    torch.testing.assert_close(result["image"], p.loc[0].double())
    torch.testing.assert_close(result["deviation"].square(), p.variance[0].double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result["row"], p.covariance_row(11)[0].double(), rtol=1e-4, atol=1e-7)
    omega = result["omega"].float()
    noisy = p.rsample(noise=(torch.zeros(1, 4), omega[None]), temperature=(1.0, 0.5))[0].double()
    torch.testing.assert_close(result["noisy"], noisy, rtol=1e-4, atol=1e-6)
    assert result["surprise"] == {"mahalanobis": 0, "count": 0}


@pytest.mark.parametrize("kind", ["one", "a stroke", "all but one"])
@pytest.mark.parametrize("R", [0, 10])
def test_conditional_density_and_covariance_at_48x40(core, R, kind):  # noqa: F811
    """Of `p.condition`, `covariance_row` and `log_prob`."""
    p = distribution((1, 48, 40, 3, 1, None), R)
    N = p.event_shape[0]
    at = np.sort(np.random.default_rng(2).permutation(N)[: {"one": 1, "a stroke": 200, "all but one": N - 1}[kind]])
    values = np.random.default_rng(3).random(len(at)).astype(np.float32)
    index = int(np.setdiff1d(np.arange(N), at)[0])
    result = edit(core, predict(p), (1, 48, 40), [(0.0, at, values)], index)
    observed = torch.zeros(N, dtype=torch.bool)
    observed[torch.from_numpy(at)] = True
    edited = p.loc.clone()
    edited[0, torch.from_numpy(at)] = torch.from_numpy(values)
    conditional = p.condition(edited, observed)
    assert (result["image"] - conditional.loc[0]).abs().max() < 1 / 255
    row = conditional.covariance_row(index)[0]
    assert (result["row"] - row).abs().max() < 1e-3 * row.abs().max()
    deviation = conditional.variance[0].sqrt()
    assert (result["deviation"] - deviation).abs().max() < 1e-3 * deviation.max()
    density = p.log_prob(result["image"][None].float()).item()
    assert result["density"] == pytest.approx(density, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weights_travel_as_they_are(precision):
    case = CASES["one stencil, tied alike"]
    p = distribution(case, 4)
    header, arrays = unpack(pack(predict(p), case[:3], precision))
    assert header["where"] == "page"
    assert header["offsets"] == [[0, 1], [1, -1], [1, 0], [1, 1]]
    assert arrays["t"].shape == (1, 24)
    assert arrays["s"].shape == (1, 4, 24)
    assert arrays["ties"].shape == (3, 1)
    np.testing.assert_array_equal(arrays["t"], p.stencil.log_diagonal.exp()[0].flatten(1).numpy())
    np.testing.assert_allclose(arrays["s"], p.stencil.neighbours[0].flatten(2).numpy(), rtol=5e-4)
    if precision == "float32":
        assert all(arrays[name].dtype == np.float32 for name in ("t", "s", "ties"))
    else:
        assert arrays["s"].dtype == np.float16
        assert 0 < header["error"]["local"] < 1e-3
