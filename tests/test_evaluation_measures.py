"""Measures of a model against what is known: densities in closed form, and models that are sampled from themselves."""

import math

import numpy as np
import pytest
import torch
import torch.distributions as td

from lowrank_mvn import (
    GlobalLocalNormal,
    LowRankMultivariateNormal,
    LowRankMultivariateStudentT,
    Stencil,
    StencilMultivariateNormal,
)
from sosvae import PixelwiseNormal
from sosvae.evaluation import baselines, bits, calibration, counted, measure, speckle

SHAPE = (1, 6, 5)
N = 30


class Linear:
    """A linear VAE, x = μ + Wz + noise: p(x) and p(z|x) are known."""

    image_shape, latents = SHAPE, 2

    def __init__(self, exact=True, variance=4e-3):
        generator = torch.Generator().manual_seed(1)
        self.W = 0.2 * torch.randn(N, self.latents, generator=generator)
        self.loc, self.variance = torch.full((N,), 0.5), variance
        precision = torch.eye(self.latents) + self.W.T @ self.W / variance
        self.of_x = torch.linalg.solve(precision, self.W.T / variance)
        # The exact posterior is not diagonal, unless it is turned to its own axes.
        values, vectors = torch.linalg.eigh(precision)
        self.W, self.of_x = self.W @ vectors, vectors.T @ self.of_x
        self.scale = values.rsqrt() * (1 if exact else 1.3)

    def encode(self, x):
        loc = (x.flatten(1) - self.loc) @ self.of_x.T
        return td.Normal(loc, self.scale.expand_as(loc), validate_args=False)

    def decode(self, z):
        return PixelwiseNormal(self.loc + z @ self.W.T, torch.tensor(self.variance))

    def marginal(self):
        return LowRankMultivariateNormal(self.loc, self.W, torch.tensor(self.variance))


def stencil(seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    return Stencil(
        1.5 + 0.2 * torch.randn(*batch, 1, 6, 5, generator=generator),
        -0.3 + 0.1 * torch.randn(*batch, 1, 4, 6, 5, generator=generator),
    )


def kinds():
    generator = torch.Generator().manual_seed(2)
    loc = torch.full((N,), 0.5) + 0.1 * torch.randn(N, generator=generator)
    P, d = 0.2 * torch.randn(N, 3, generator=generator), 0.01 + 0.02 * torch.rand(N, generator=generator)
    return {
        "pixelwise": PixelwiseNormal(loc, d),
        "structured": LowRankMultivariateNormal(loc, P, d),
        "precision": StencilMultivariateNormal(loc, stencil()),
        "global-local": GlobalLocalNormal(loc, P, stencil()),
        "heavy": LowRankMultivariateStudentT(torch.tensor(12.0), loc, P, d),
    }


KINDS = list(kinds())
NORMALS = KINDS[:-1]


class Fixed:
    """A model whose code says nothing: p(x|z) is one distribution, whatever z is."""

    image_shape, latents = SHAPE, 2

    def __init__(self, p):
        self.p = p

    def encode(self, x):
        zero = torch.zeros(len(x), self.latents)
        return td.Normal(zero, zero + 1, validate_args=False)

    def decode(self, z):
        return self.p.expand((len(z),))


# --- Bits ---------------------------------------------------------------------------------------------------


def test_bytes_are_dequantised_by_their_own_noise_whatever_their_block():
    images = np.random.default_rng(0).integers(0, 256, (7, *SHAPE)).astype(np.uint8)
    x = bits.dequantised(images, seed=3, first=10)
    again = torch.cat([bits.dequantised(images[:2], 3, 10), bits.dequantised(images[2:], 3, 12)])
    assert x.dtype == torch.float32
    assert torch.equal(x, again)
    assert not torch.equal(x, bits.dequantised(images, 4, 10))
    off = x.double() * 255 - torch.from_numpy(images)
    assert off.min() >= -0.5001
    assert off.max() <= 0.5001
    assert abs(float(off.mean())) < 5 * math.sqrt(1 / 12 / off.numel())


def test_a_byte_of_which_nothing_is_known_costs_eight_bits():
    """A density that is even over what dequantised intensities can be, −½/255 to 255½/255."""
    uniform = torch.tensor(-N * math.log(256 / 255))
    assert float(bits.per_dimension(uniform, N)) == pytest.approx(bits.UNIFORM, abs=1e-6)


def test_the_bound_is_the_density_where_the_posterior_is_exact():
    model = Linear()
    x = model.marginal().sample((5,)).view(5, *SHAPE)
    expected = model.marginal().log_prob(x.flatten(1)).double()
    for codes in (1, 8):
        found = bits.bound(model, x, torch.randn(codes, 5, 2))
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # float32: sums of squares of about 1e3


def test_the_bound_grows_with_codes_towards_the_density():
    model = Linear(exact=False)
    x = model.marginal().sample((200,)).view(200, *SHAPE)
    expected = float(model.marginal().log_prob(x.flatten(1)).mean())
    found = [float(bits.bound(model, x, torch.randn(codes, 200, 2)).mean()) for codes in (1, 4, 64)]
    assert found[0] < found[1] < found[2] < expected + 0.05
    assert expected - found[0] > 0.05
    assert expected - found[2] < 0.05


def test_measured_bits_are_those_of_the_density():
    model = Linear()
    images = model.marginal().sample((64,)).mul(255).round().clamp(0, 255).byte().view(64, *SHAPE).numpy()
    found = measure.measure(model, images, measure.Settings(codes=4, samples=2))
    x = bits.dequantised(images, 0).flatten(1)
    expected = -model.marginal().log_prob(x).double().mean() / (N * math.log(2)) + math.log2(255)
    assert found["bits"] == pytest.approx(float(expected), abs=1e-4)
    assert found["bits_likelihood"] < found["bits"]  # without what the code costs
    assert 0 < found["bits_error"] < 0.2
    assert (found["images"], found["values"]) == (64, N)


def test_noise_of_another_shape_is_named():
    model = Linear()
    with pytest.raises(ValueError, match=r"noise has shape \[3, 4, 2\], expected \[codes, 5, 2\]"):
        bits.bound(model, torch.zeros(5, *SHAPE), torch.zeros(3, 4, 2))


# --- Calibration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("some", [False, True])
def test_a_model_that_is_sampled_from_itself_is_calibrated(kind, some):
    p, B = kinds()[kind], 4000
    mask = torch.arange(N) % 3 > 0 if some else None
    count = int(mask.sum()) if some else N
    x = p.sample((B,))
    found = calibration.squares(p.expand((B,)), x, mask)
    # Of χ² with `count` degrees of freedom, or of F with these and ν, times (ν − 2)/ν.
    spread = 2 / count if kind != "heavy" else 2 * (count + 10) / (count * 8)
    assert float(found.mean()) == pytest.approx(1, abs=5 * math.sqrt(spread / B))
    assert float(found.var()) == pytest.approx(spread, rel=0.3 if kind != "heavy" else 0.6)
    for share, inside in zip(calibration.INTERVALS, calibration.inside(p.expand((B,)), x, counted=mask), strict=True):
        assert float(inside.mean()) == pytest.approx(share, abs=0.02)  # pixels of one image go together


@pytest.mark.parametrize("kind", NORMALS)
def test_counted_pixels_have_the_density_of_the_others_integrated_out(kind):
    p = kinds()[kind]
    mask = torch.arange(N) % 3 > 0
    x = p.sample((4,))
    Sigma = torch.stack([p.covariance_row(n) for n in range(N)]).double()[mask][:, mask]
    expected = td.MultivariateNormal(p.loc.double()[mask], Sigma)
    log_prob, entropy = counted.log_prob_and_entropy(p.expand((4,)), x, mask)
    torch.testing.assert_close(log_prob.double(), expected.log_prob(x[:, mask].double()), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(entropy.double(), expected.entropy().expand(4), rtol=1e-4, atol=1e-3)
    x[:, ~mask] += 100  # what does not count changes nothing
    far, _ = counted.log_prob_and_entropy(p.expand((4,)), x, mask)
    torch.testing.assert_close(far, log_prob, rtol=1e-2, atol=1e-1)


def test_a_variance_four_times_too_small_shows():
    loc, d = torch.full((500, N), 0.5), torch.tensor(0.04)
    x = PixelwiseNormal(loc, d).sample()
    wrong = PixelwiseNormal(loc, d / 4)
    assert float(calibration.squares(wrong, x).mean()) == pytest.approx(4, rel=0.05)
    half, most = calibration.inside(wrong, x).mean(-1)
    assert float(half) == pytest.approx(math.erf(0.67449 / 2 / math.sqrt(2)), abs=0.02)
    assert float(most) == pytest.approx(math.erf(1.64485 / 2 / math.sqrt(2)), abs=0.02)


def test_the_energy_score_is_lowest_for_the_right_model():
    loc, d = torch.full((400, N), 0.5), torch.tensor(0.04)
    x = PixelwiseNormal(loc, d).sample()

    def score(p):
        return float(calibration.energy(p.sample((16,)), x).mean())

    right = score(PixelwiseNormal(loc, d))
    for wrong in (PixelwiseNormal(loc + 0.1, d), PixelwiseNormal(loc, d * 4), PixelwiseNormal(loc, d / 16)):
        assert score(wrong) > right + 0.01
    with pytest.raises(ValueError, match="S of at least 2"):
        calibration.energy(x[None], x)


def test_the_energy_score_is_the_textbook_s():
    y, x = torch.randn(5, 3, N), torch.randn(3, N)
    pairs = [(y[a] - y[b]).norm(dim=-1) for a in range(5) for b in range(5) if a != b]
    expected = (y - x).norm(dim=-1).mean(0) - 0.5 * torch.stack(pairs).mean(0)
    torch.testing.assert_close(calibration.energy(y, x), expected.double(), rtol=1e-5, atol=1e-5)
    mask = torch.arange(N) < 7
    torch.testing.assert_close(calibration.energy(y, x, mask), calibration.energy(y[..., :7], x[..., :7]))


# --- Speckle ------------------------------------------------------------------------------------------------


def test_pooled_correlation_is_that_of_a_known_process():
    """Along each row x' = 0.8 x + noise, rows independent: 0.8 horizontally and 0 vertically."""
    noise = torch.randn(20, 1, 200, 400)
    rows = [noise[..., 0]]
    for i in range(1, 400):
        rows.append(0.8 * rows[-1] + 0.6 * noise[..., i])
    images = torch.stack(rows, -1)
    found = speckle.pooled(speckle.sums(images).sum(0))
    assert found["horizontal"] == pytest.approx(0.8, abs=5e-3)
    assert found["vertical"] == pytest.approx(0.0, abs=5e-3)
    # Sums add, and one image that is brighter than all counts by its square.
    assert speckle.pooled(speckle.sums(images[:1] * 100)[0] + speckle.sums(images[1:]).sum(0))[
        "vertical"
    ] == pytest.approx(speckle.pooled(speckle.sums(images[:1])[0])["vertical"], abs=1e-2)


def test_pairs_count_where_both_pixels_do():
    images = torch.randn(1, 2, 3, 3)
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[1, 1, 1] = False
    images[0, 1, 1, 1] = torch.inf
    images = torch.where(mask, images, torch.zeros(()))
    found = speckle.sums(images, mask.flatten())
    whole = speckle.sums(images)
    assert torch.equal(found[..., 0], whole[..., 0])  # a pixel of 0 has no products
    assert (found[..., 1] < whole[..., 1]).all()
    with pytest.raises(ValueError, match="2×2"):
        speckle.sums(torch.zeros(1, 1, 4))


# --- One pass over images -----------------------------------------------------------------------------------


def test_the_black_surround_is_left_out():
    images = np.zeros((40, 1, 6, 5), np.uint8)
    images[:, :, 1:4] = np.random.default_rng(0).integers(0, 256, (40, 1, 3, 5))
    mask = counted.changing(images)
    assert mask.view(6, 5).any(1).tolist() == [False, True, True, True, False, False]
    assert counted.changing(images[:, :, 1:4]) is None
    with pytest.raises(ValueError, match="all 40 images are black everywhere"):
        counted.changing(np.zeros_like(images))
    model = Fixed(kinds()["structured"])
    some = measure.measure(model, images, measure.Settings(4, 2), counted=mask)
    assert some["values"] == 15
    rows = LowRankMultivariateNormal(model.p.loc[mask], model.p.cov_factor[mask], model.p.cov_diag[mask])
    x = bits.dequantised(images, 0).flatten(1)[:, mask]
    assert some["log_likelihood"] == pytest.approx(float(rows.log_prob(x).mean()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_goes_through_one_pass(kind):
    model = Fixed(kinds()[kind])
    images = model.p.sample((40,)).mul(255).round().clamp(0, 255).byte().view(40, *SHAPE).numpy()
    told = []
    found = measure.measure(model, images, measure.Settings(4, 4), advanced=told.append)
    assert told == [16, 16, 8]
    assert all(math.isfinite(value) for value in found.values())
    assert found["squares"] == pytest.approx(1, abs=0.4)
    for axis in speckle.AXES:  # of samples and of residuals alike, as images are samples
        assert found[f"{axis}_samples"] == pytest.approx(found[f"{axis}_residual"], abs=0.15)


def test_images_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"images has shape \[3, 1, 6, 6\], expected \[images, 1, 6, 5\]"):
        measure.measure(Linear(), np.zeros((3, 1, 6, 6), np.uint8))
    with pytest.raises(ValueError, match="images has shape"):
        measure.measure(Linear(), np.zeros((0, *SHAPE), np.uint8))


def test_one_sigma_is_the_most_likely_one():
    model = Linear()
    x = model.marginal().sample((300,)).view(-1, *SHAPE)
    row = baselines.one_sigma(model, x)
    delta = x.flatten(1) - row.decode(row.encode(x).loc).loc
    assert row.variance == pytest.approx(float(delta.square().mean()))
    likelihood = [
        float(baselines.OneSigma(model, row.variance * by).decode(row.encode(x).loc).log_prob(x.flatten(1)).mean())
        for by in (0.9, 1.0, 1.1)
    ]
    assert likelihood[1] == max(likelihood)
