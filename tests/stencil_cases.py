"""Inputs and a dense oracle for the tests of stencils; a module of data and functions, without tests."""

import itertools
import math

import torch

from lowrank_mvn import Stencil, StencilMultivariateNormal

F64 = torch.float64
# (id, batch, channels, spatial, neighbourhood, stencils: one or own, ties: none, pixel or one): ragged first.
SHAPES = [
    ("row", (2,), 1, (7,), (5,), "own", None),
    ("no-batch", (), 1, (3, 2), (3, 3), "own", None),
    ("grey", (2,), 1, (4, 5), (3, 3), "own", None),
    ("wide", (2,), 1, (5, 6), (5, 5), "own", None),
    ("flat", (1,), 1, (2, 5), (3, 5), "own", None),
    ("colour", (2,), 3, (3, 4), (3, 3), "own", "pixel"),
    ("colour-one-tie", (2,), 3, (4, 3), (3, 3), "own", "one"),
    ("colour-one-stencil", (2,), 3, (3, 4), (3, 3), "one", None),
    ("colour-one-of-each", (2,), 2, (3, 3), (3, 3), "one", "one"),
    ("two-batch-dims", (2, 3), 2, (3, 3), (3, 3), "own", "pixel"),
    ("volume", (2,), 1, (3, 4, 3), (3, 3, 3), "own", None),
    ("empty-batch", (0,), 1, (3, 3), (3, 3), "own", None),
]
IDS = [shape[0] for shape in SHAPES]
GREY, COLOUR = SHAPES[2], SHAPES[5]


def weights(batch, channels, spatial, neighbourhood, stencils="own", ties=None, dtype=F64, scale=0.4):
    """log_diagonal, neighbours and ties."""
    rows = channels if stencils == "own" else 1
    later = (math.prod(neighbourhood) - 1) // 2
    log_diagonal = 0.3 * torch.randn(*batch, rows, *spatial, dtype=F64) + 0.5
    neighbours = scale * torch.randn(*batch, rows, later, *spatial, dtype=F64)
    pairs = channels * (channels - 1) // 2
    size = spatial if ties == "pixel" else (1,) * len(spatial)
    tied = None if ties is None else scale * torch.randn(*batch, pairs, *size, dtype=F64)
    return log_diagonal.to(dtype), neighbours.to(dtype), None if tied is None else tied.to(dtype)


def make(shape, dtype=F64, **options):
    """A stencil, and a mean [..., N] of its batch shape, of one of SHAPES."""
    _, batch, channels, spatial, neighbourhood, stencils, ties = shape
    parts = weights(batch, channels, spatial, neighbourhood, stencils, ties, dtype, **options)
    stencil = Stencil(*parts, neighbourhood, channels)
    return stencil, torch.randn(*batch, channels * math.prod(spatial), dtype=F64).to(dtype)


def matrix(stencil):
    """T [..., N, N] in float64, entry by entry."""
    channels, spatial = stencil.channels, stencil.spatial
    zero = (0,) * len(spatial)
    window = itertools.product(*(range(-(f // 2), f // 2 + 1) for f in stencil.neighbourhood))
    later = [offset for offset in window if offset > zero]
    pixels = list(itertools.product(*map(range, spatial)))
    place = {(c, *p): c * len(pixels) + i for c in range(channels) for i, p in enumerate(pixels)}
    T = torch.zeros(*stencil.batch_shape, len(place), len(place), dtype=F64)
    t, s = stencil.log_diagonal.double().exp(), stencil.neighbours.double()
    pairs = list(itertools.combinations(range(channels), 2))
    for c, p in itertools.product(range(channels), pixels):
        row = c if t.shape[-len(spatial) - 1] > 1 else 0
        own, n = t[(..., row, *p)], place[(c, *p)]
        T[..., n, n] = own
        for k, offset in enumerate(later):
            neighbour = (c, *(i + o for i, o in zip(p, offset, strict=True)))
            if neighbour in place:
                T[..., place[neighbour], n] = own * s[(..., row, k, *p)]
        for k, (first, second) in enumerate(pairs if stencil.ties is not None else ()):
            if first == c:
                m = stencil.ties.double()
                where = p if m.shape[-len(spatial) :].numel() > 1 else zero
                T[..., place[(second, *p)], n] = own * m[(..., k, *where)]
    return T


class Dense:
    """The textbook with N×N matrices in float64: of T alone, or of P beside it."""

    def __init__(self, loc, stencil, P=None):
        T = matrix(stencil)
        self.loc, self.covariance = loc.double(), torch.linalg.inv(T @ T.mT)
        if P is not None:
            self.covariance = self.covariance + P.double() @ P.double().mT

    def log_prob(self, x):
        delta = (x.double() - self.loc).unsqueeze(-1)
        q = (delta * torch.linalg.solve(self.covariance, delta)).sum((-2, -1))
        return -0.5 * (x.shape[-1] * math.log(2 * math.pi) + torch.logdet(self.covariance) + q)

    def entropy(self):
        return 0.5 * (self.loc.shape[-1] * (1 + math.log(2 * math.pi)) + torch.logdet(self.covariance))


def distribution(shape, **options):
    stencil, loc = make(shape, **options)
    return StencilMultivariateNormal(loc, stencil, validate_args=True)


def parts(stencil):
    return [t for t in (stencil.log_diagonal, stencil.neighbours, stencil.ties) if t is not None]


def of_parts(stencil, tensors):
    log_diagonal, neighbours, *ties = tensors
    return Stencil(log_diagonal, neighbours, *(ties or [None]), stencil.neighbourhood, stencil.channels)


def textbook_condition(loc, Sigma, value, observed, variance):
    """Mean and covariance by the gain Σ₂ᵀ(Σ₂₂ + τ²)⁻¹, item by item."""
    N = loc.shape[-1]
    means, covs = [], []
    flat = zip(loc.reshape(-1, N), Sigma.reshape(-1, N, N), value.reshape(-1, N), observed.reshape(-1, N), strict=True)
    for m, S, b, o in flat:
        noise = (torch.zeros(N, dtype=F64) if variance is None else variance.expand(N))[o]
        gain = S[:, o] @ torch.linalg.inv(S[o][:, o] + noise.diag())
        means.append(m + gain @ (b[o] - m[o]))
        covs.append(S - gain @ S[o])
    if not means:
        return loc, Sigma
    return torch.stack(means).reshape(loc.shape), torch.stack(covs).reshape(Sigma.shape)
