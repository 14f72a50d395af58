"""One normal N(μ, PPᵀ + D) over a data set, without a network (paper, section 4.5): by gradient, by EM, in closed form.

With one d for all pixels the likelihood has a known maximum (probabilistic PCA, Tipping & Bishop 1999):

    λ₁ ≥ λ₂ ≥ … eigenvalues of the covariance S,  d = (tr S − Σ_{r≤R} λᵣ)/(N − R),  P = U (Λ − d)^½

With d for each pixel (factor analysis) EM climbs to one. With δ = x − μ and, for the current P and d, C = I + PᵀD⁻¹P:

    E   a = C⁻¹PᵀD⁻¹δ for each image
    M   P ← (Σ δaᵀ)(M·C⁻¹ + Σ aaᵀ)⁻¹,  d ← diag S − diag(P Σ aδᵀ)/M, not below a floor

Nothing is larger than the images or N×R. A variance of a pixel that hardly changes has no lower bound but the floor;
with d held there, the M step of d is still the best one, as its likelihood falls on both sides of its maximum.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributions as td
from numpy.typing import NDArray
from torch import Tensor

from lowrank_mvn import LowRankMultivariateNormal

from .. import devices
from ..models.observation import Observation
from .bits import dequantised

__all__ = ["Constant", "Images", "Normal", "by_em", "by_gradient", "check_rank", "in_closed_form", "of_pca"]

AT_ONCE = 256  # images
KEPT = 1 << 28  # values of images that are kept in memory: 1 GiB

Told = Callable[[int, float], None]  # steps or iterations so far, and log p in nats for each image


def _untold(count: int, log_prob: float) -> None:
    pass


class Images:
    """Dequantised images, float32 [M, N], of which a few are in memory at once; all, where they fit into 1 GiB.

    Args:
        images: bytes, [·, channels, H, W], possibly memory-mapped.
        seed: of the noise of dequantisation.
        indices: of the M images; by default all of them.

    Raises:
        ValueError: fewer than two images, or all of them are the same.
    """

    def __init__(self, images: NDArray[np.uint8], seed: int = 0, indices: NDArray[np.int64] | None = None) -> None:
        indices = np.arange(len(images)) if indices is None else indices
        if len(indices) < 2:
            raise ValueError(f"there are {len(indices)} images, expected at least 2 for a variance")
        self._bytes, self._seed, self._indices = images, seed, indices
        self.M, self.N = len(indices), math.prod(images.shape[1:])
        self._kept = torch.cat(list(self._made())) if self.M * self.N <= KEPT else None
        if all(np.array_equal(images[i], images[indices[0]]) for i in indices):
            raise ValueError(f"all {self.M} images are the same, expected images that differ")

    def _made(self) -> Iterator[Tensor]:
        for start in range(0, self.M, AT_ONCE):
            some = self._indices[start : start + AT_ONCE]
            yield dequantised(self._bytes[some], self._seed, start).flatten(1)

    def blocks(self) -> Iterator[Tensor]:
        """All images, some at a time, [·, N]."""
        return self._made() if self._kept is None else iter(self._kept.split(AT_ONCE))

    def drawn(self, indices: NDArray[np.int64]) -> Tensor:
        """Some of the M images, by number, [·, N]."""
        if self._kept is not None:
            return self._kept[torch.from_numpy(indices)]
        places = self._indices[indices]
        parts = [dequantised(self._bytes[[j]], self._seed, i) for i, j in zip(indices.tolist(), places, strict=True)]
        return torch.cat(parts).flatten(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each pixel, [N], float64: the second pass is centred on the mean of the first."""
        mean = sum((x.double().sum(0) for x in self.blocks()), torch.zeros(self.N, dtype=torch.float64)) / self.M
        squares = (((x - mean).square().sum(0)) for x in self.blocks())
        return mean, sum(squares, torch.zeros_like(mean)) / self.M


class Normal(NamedTuple):
    """N(μ, PPᵀ + D), float64."""

    loc: Tensor  # [N]
    factor: Tensor  # [N, R]
    diag: Tensor  # [N], or [] where all pixels have one

    def distribution(self) -> LowRankMultivariateNormal:
        """In float32."""
        return LowRankMultivariateNormal(self.loc.float(), self.factor.float(), self.diag.float(), validate_args=False)

    def log_prob(self, images: Images) -> float:
        """Mean log-density of images, nats for each."""
        R, N = self.factor.shape[1], len(self.loc)
        d = self.diag.expand(N)
        weighted = self.factor / d[:, None]
        L = torch.linalg.cholesky(torch.eye(R, dtype=d.dtype) + self.factor.mT @ weighted)
        total = 0.0
        for x in images.blocks():
            delta = x.double() - self.loc
            v = torch.cholesky_solve((delta @ weighted).mT, L).mT
            # The sum of squares: the difference of the textbook's two terms has no digits left where d is small.
            rest = delta - v @ self.factor.mT
            total += float((rest.square() / d).sum() + v.square().sum())
        logdet = float(2 * L.diagonal().log().sum() + d.log().sum())
        return -0.5 * (N * math.log(2 * math.pi) + logdet + total / images.M)

    def components(self) -> Tensor:
        """Principal components of PPᵀ times their standard deviations, [R, N], the largest first, of either sign."""
        V = torch.linalg.eigh(self.factor.mT @ self.factor).eigenvectors.flip(-1)  # eigenvalues ascend
        found: Tensor = (self.factor @ V).mT
        return found


class Constant:
    """A normal over images as a model whose code says nothing, so that the bound is its density.

    Args:
        normal: over [N].
        image_shape: channels, H, W of N.
    """

    latents = 1

    def __init__(self, normal: Normal, image_shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.image_shape = image_shape
        moved = Normal(*(part.to(device) for part in normal))
        self._p = moved.distribution()

    def encode(self, x: Tensor) -> td.Normal:
        loc = x.new_zeros(len(x), self.latents)
        return td.Normal(loc, loc + 1, validate_args=False)

    def decode(self, z: Tensor) -> Observation:
        return self._p.expand((len(z),))


def check_rank(rank: int, images: Images) -> None:
    """Raises: ValueError: no rank that so many images, or pixels, leave a variance beside."""
    most = min(images.M - 2, images.N - 1)
    if not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}, expected 1 to {most} for {images.M} training images of {images.N} values")


def in_closed_form(images: Images, rank: int) -> Normal:
    """The most likely normal with one d. Eigenvectors are found by Lanczos iterations (scipy), to rounding.

    Raises:
        ValueError: as of `check_rank`.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    check_rank(rank, images)
    mean, variance = images.moments()

    def times(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        v = torch.from_numpy(np.ascontiguousarray(vector.reshape(images.N)))
        total = torch.zeros(images.N, dtype=torch.float64)
        for x in images.blocks():
            delta = x.double() - mean
            total += delta.mT @ (delta @ v)
        product: NDArray[np.float64] = (total / images.M).numpy()
        return product

    S = LinearOperator((images.N, images.N), matvec=times, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(images.N)  # else scipy's own, which differs from run to run
    values, vectors = eigsh(S, k=rank, v0=start)
    values, U = torch.from_numpy(values.copy()).flip(0), torch.from_numpy(vectors.copy()).flip(1)
    d = (variance.sum() - values.sum()) / (images.N - rank)
    return Normal(mean, U * (values - d).clamp_min(0).sqrt(), d)


def by_em(
    images: Images,
    rank: int,
    *,
    per_pixel: bool,
    floor: float = 1e-5,
    iterations: int = 2000,
    tolerance: float = 1e-3,
    seed: int = 0,
    advanced: Told = _untold,
) -> Normal:
    """By expectation maximisation, from a random P and the images' own variances.

    Args:
        per_pixel: d for each pixel, or one for all.
        floor: least d (squared intensity).
        iterations: at most.
        tolerance: it ends where ten iterations add less than this (nats for each image).
        advanced: told of each iteration.

    Raises:
        ValueError: as of `check_rank`.
    """
    check_rank(rank, images)
    mean, variance = images.moments()
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(images.N, rank, dtype=torch.float64, generator=generator) * (variance.mean() / rank).sqrt()
    d = (variance if per_pixel else variance.mean().expand_as(variance)).clamp_min(floor)
    eye, before = torch.eye(rank, dtype=torch.float64), -math.inf
    for i in range(iterations):
        weighted = P / d[:, None]
        C = eye + P.mT @ weighted
        L = torch.linalg.cholesky(C)
        solve = torch.cholesky_solve(weighted.mT, L).mT  # [N, R]
        to_delta, second = torch.zeros_like(P), torch.zeros_like(C)
        for x in images.blocks():
            delta = x.double() - mean
            a = delta @ solve
            to_delta += delta.mT @ a
            second += a.mT @ a
        to_delta, second = to_delta / images.M, second / images.M
        explained = (C * second).sum()
        logdet = 2 * L.diagonal().log().sum() + d.log().sum()
        log_prob = -0.5 * float(images.N * math.log(2 * math.pi) + logdet + (variance / d).sum() - explained)
        advanced(i, log_prob)
        if i % 10 == 0:
            if log_prob - before < tolerance:
                break
            before = log_prob
        P = torch.linalg.solve(torch.cholesky_solve(eye, L) + second, to_delta.mT).mT
        rest = variance - (P * to_delta).sum(-1)
        d = (rest if per_pixel else rest.mean().expand_as(rest)).clamp_min(floor)
    return Normal(mean, P, d if per_pixel else d[0])


@torch.enable_grad()
def by_gradient(
    images: Images,
    rank: int,
    *,
    per_pixel: bool,
    floor: float = 1e-5,
    steps: int = 600,
    batch: int = 256,
    lr: float = 1e-2,
    iterations: int = 400,
    seed: int = 0,
    advanced: Told = _untold,
) -> Normal:
    """By gradient on μ, P and log(d − floor), from a grey mean, a random P and d = 0.05: Adam, then L-BFGS.

    Adam comes near from anywhere, and crawls along the valleys that P's scale and d's leave; the second takes curvature
    into account, over all images in each iteration.

    Args:
        per_pixel, floor: as of `by_em`.
        steps, lr: of Adam; lr goes down along a cosine to nothing.
        batch: images for each step; all of them, where there are no more.
        iterations: of L-BFGS.
        advanced: told of each step.

    Raises:
        ValueError: as of `check_rank`.
    """
    check_rank(rank, images)
    with devices.seeded(torch.device("cpu"), seed):
        loc = torch.full((images.N,), 0.5, requires_grad=True)
        P = (0.01 * torch.randn(images.N, rank)).requires_grad_()
        log_d = torch.full((images.N if per_pixel else 1,), math.log(0.05)).requires_grad_()
    optimizer = torch.optim.Adam([loc, P, log_d], lr=lr)
    draws = np.random.default_rng(seed)
    order = draws.permutation(images.M)
    count, at = min(batch, images.M), 0
    for step in range(steps):
        if at + count > images.M:
            order, at = draws.permutation(images.M), 0
        x = images.drawn(order[at : at + count])
        at += count
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        p = LowRankMultivariateNormal(loc, P, floor + log_d.exp(), validate_args=False)
        log_prob = p.log_prob(x).mean()
        (-log_prob / images.N).backward()
        optimizer.step()
        advanced(step, float(log_prob.detach()))

    second = torch.optim.LBFGS(
        [loc, P, log_d], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure() -> Tensor:
        second.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for x in images.blocks():
            p = LowRankMultivariateNormal(loc, P, floor + log_d.exp(), validate_args=False)
            loss = -p.log_prob(x).double().sum() / (images.M * images.N)
            loss.backward()
            total += loss.detach()
        return total

    second.step(closure)
    d = floor + log_d.detach().double().exp()
    return Normal(loc.detach().double(), P.detach().double(), d if per_pixel else d[0])


def of_pca(images: Images, rank: int) -> Normal:
    """What scikit-learn's PCA of this rank takes for the normal of the images (`PCA.get_covariance`).

    Its one d is an average over min(M, N) − R directions, and not over N − R: above the most likely one where there are
    fewer images than pixels.

    Raises:
        ValueError: as of `check_rank`. ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.decomposition import PCA, IncrementalPCA

    check_rank(rank, images)
    if images.M * images.N <= KEPT:
        pca = PCA(rank, svd_solver="arpack", random_state=0).fit(torch.cat(list(images.blocks())).numpy())
    else:
        pca = IncrementalPCA(rank)
        for x in images.blocks():
            if len(x) >= rank:
                pca.partial_fit(x.numpy())
    noise = float(pca.noise_variance_)
    scale = np.sqrt(np.maximum(pca.explained_variance_ - noise, 0))
    factor = torch.from_numpy(np.asarray(pca.components_.T * scale, dtype=np.float64))
    return Normal(torch.from_numpy(np.asarray(pca.mean_, dtype=np.float64)), factor, torch.tensor(noise).double())
