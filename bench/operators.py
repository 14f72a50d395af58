"""Operators as data: what is benchmarked, on which inputs, at which floor, and when its result is right.

`peers_torch` and `peers_jax` say how each peer does the job. Nothing here imports torch or jax, so that the inputs of
all peers are the same numbers whichever library is in the process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from . import errors, inputs
from .inputs import Arrays, Case

__all__ = ["BRAIN", "CELEBA", "FLOAT", "OPERATORS", "SMALL", "Arrays", "Case", "Operator", "Traffic"]

FLOAT = 4  # bytes: everything is timed in float32
TINY = Case(5, 7, 3, batch=2, rank=3)


class Traffic(NamedTuple):
    """How often arrays of each size are read or written, at the least and with no cache between passes."""

    P: float = 0  # [B, N, R]
    vectors: float = 0  # [B, N]
    d: float = 0  # [B, N] where each pixel has its own; one d for all pixels is no traffic
    F: float = 0  # [B, K, pixels]

    def bytes(self, case: Case) -> float:
        vector = case.batch * case.N
        d = self.d * (case.diagonal == "pixel")
        F = self.F * case.batch * inputs.K * case.pixels
        return FLOAT * (vector * (self.P * case.rank + self.vectors + d) + F)


@dataclass(frozen=True)
class Operator:
    """One benchmarked operator."""

    name: str
    title: str
    peers: tuple[str, ...]  # names of `peers.PEERS` that do the same job, ours first
    inputs: Callable[[Case], Arrays]
    errors: Callable[[Arrays, Arrays, Arrays], dict[str, float]]  # of inputs, outputs, float64 outputs
    terms: tuple[str, ...] = ()  # log_prob and entropy, where the operator returns them
    gradients: tuple[str, ...] = ()  # the inputs in which Σ(H − log p), or what a sample is used for, is differentiated
    traffic: Traffic | None = None  # None where no floor is claimed
    operations: Callable[[Case], float] | None = None  # additions and multiplications
    oracle: bool = True  # whether `errors` compares with float64 outputs, or inputs and outputs suffice
    tiny: Case = TINY  # where every peer shows first that it does the same job

    def leaves(self, case: Case) -> list[str]:
        """The inputs with gradients: one d for all pixels is fixed, as the paper's is."""
        return [name for name in self.gradients if name != "d" or case.diagonal == "pixel"]

    def floor(self, case: Case, copy_bandwidth: float, product_rate: float) -> float | None:
        """Least time [s] on a machine with that copy bandwidth [byte/s] and matrix-product rate [1/s]."""
        if self.traffic is None or self.operations is None:
            return None
        return max(self.traffic.bytes(case) / copy_bandwidth, self.operations(case) / product_rate)


def _product(case: Case) -> int:
    """Operations of a product of P with one vector."""
    return 2 * case.batch * case.N * case.rank


def _gram(columns: int) -> float:
    """Products with one vector in a Gram matrix, which is symmetric."""
    return (columns + 1) / 2


def _condition_operations(case: Case) -> float:
    # The Gram and w are of the observed half; then the mean and the factor.
    observed = (case.width // 2 + 1) / case.width
    return _product(case) * (observed * (_gram(case.rank) + 1) + 1 + case.rank)


def _linear_operations(case: Case) -> float:
    # G_c and M_c F̃, for each channel where each pixel has its d; six products for each channel.
    distinct = case.channels if case.diagonal == "pixel" else 1
    product = 2 * case.batch * inputs.K * case.pixels
    return product * (distinct * (_gram(inputs.K) + inputs.K) + 6 * case.channels)


LIBRARIES = ("ours", "torch", "compile", "linear_operator", "numpyro")


def _density(title: str, terms: tuple[str, ...], backward: bool) -> Operator:
    """P is read twice for log p, once for H alone; its gradient is one more read and one write. x, μ and d are read in
    each pass."""
    scored = "log_prob" in terms
    passes = (2 if scored else 1) + 2 * backward

    def operations(case: Case) -> float:
        products = _gram(case.rank) + 3 * scored  # C; w, Pv, residual
        if backward:
            products += case.rank + 2 * scored + (case.diagonal == "pixel")  # PC⁻¹; Pv, z vᵀ; π
        return _product(case) * products

    return Operator(
        name="_".join([*terms, *(["backward"] if backward else [])]),
        title=title,
        peers=LIBRARIES,
        inputs=inputs.density,
        errors=errors.oracle,
        terms=terms,
        gradients=(("loc", "P", "d") if scored else ("P", "d")) if backward else (),
        traffic=Traffic(P=passes, vectors=(4 + 3 * backward) * scored, d=passes),
        operations=operations,
    )


_ALL = (
    _density("log p", ("log_prob",), backward=False),
    _density("H", ("entropy",), backward=False),
    _density("log p with backward", ("log_prob",), backward=True),
    _density("H with backward", ("entropy",), backward=True),
    _density("log p and H with backward", ("log_prob", "entropy"), backward=True),
    Operator(
        name="rsample_backward",
        title="a sample with backward",
        peers=("ours", "torch", "compile", "numpyro"),
        inputs=inputs.sample,
        errors=errors.sample,
        gradients=("loc", "P", "d"),
        # P is read and its gradient written once; the noise is drawn again in the backward, never stored.
        traffic=Traffic(P=2, vectors=4, d=3),
        operations=lambda case: 1.5 * _product(case),
        oracle=False,
    ),
    Operator(
        name="condition",
        title="conditional given half of the pixels",
        peers=("ours", "textbook", "textbook_compile"),
        inputs=inputs.condition,
        errors=errors.oracle,
        # P is read twice and the conditional's factor written once; the mask is one byte a pixel, read twice.
        traffic=Traffic(P=3, vectors=6.5, d=2),
        operations=_condition_operations,
    ),
    Operator(
        name="linear_backward",
        title="head and likelihood with backward",
        peers=LIBRARIES,
        inputs=inputs.linear,
        errors=errors.oracle,
        terms=("log_prob", "entropy"),
        gradients=("features", "weight", "bias", "mean_weight", "mean_bias", "d"),
        # F is read twice forward, read and its gradient written backward; P, which the peers write, does not count.
        traffic=Traffic(F=4, vectors=3, d=4),
        operations=_linear_operations,
    ),
    Operator(
        name="stencil_backward",
        title="log p of a 3×3 precision with backward",
        peers=("ours", "convolution"),
        inputs=inputs.stencil,
        errors=errors.oracle,
        terms=("log_prob",),
        gradients=("loc", "log_diagonal", "neighbours"),
        # x, μ and five weights are read twice and y once and written once; the gradients of μ and the weights.
        traffic=Traffic(vectors=2 * 7 + 2 + 6),
        operations=lambda case: case.batch * case.N * (2 * 4 + 4 + 4 * 4 + 8),
    ),
    Operator(
        name="stencil_sample",
        title="64 samples of a 3×3 precision",
        peers=("ours", "torchsparsegradutils", "cholespy", "cholespy_solve"),
        inputs=inputs.stencil_sample,
        errors=errors.oracle,
        # The noise is read and a sample written; the weights and μ count once for all of them.
        traffic=Traffic(vectors=2 * 64 + 6),
        operations=lambda case: 64 * case.batch * case.N * (2 * 4 + 2),
    ),
    # The paper's network with d = 1e-3, of which the convolutions take most: no floor is claimed. torch's class stands
    # in the same network with P materialised; the β-VAE has the same decoder with independent pixels.
    Operator(
        name="train_step",
        title="a training step of SOS-VAE",
        peers=("ours", "betavae", "torch"),
        inputs=inputs.training,
        errors=errors.training,
        oracle=False,
        tiny=Case(16, 16, 1, batch=2, rank=3, diagonal="scalar"),
    ),
)

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ALL}

SMALL, BRAIN, CELEBA = Case(64, 64, 1), Case(160, 192, 1), Case(218, 178, 3)  # the paper's three
