"""Operators as data: what is benchmarked, on which inputs, at which floor, and when its result is right.

An `Operator` says all that is known about one: inputs, least bytes and operations with their assumptions, errors of a
result, and who else does the same job. `peers_torch` and `peers_jax` say how each of them does it. Nothing here
imports torch or jax, so that the inputs of all peers are the same numbers whichever library is in the process.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

__all__ = ["OPERATORS", "Arrays", "Case", "Entry", "Operator", "default_plan", "full_plan"]

Arrays = dict[str, np.ndarray]

FLOAT = 4  # bytes: everything is timed in float32
FEATURES = 64  # K of the linear factor, the paper's
FIXED_DIAGONAL = 1e-5  # the paper's ε, which it fixes for all pixels
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    """One set of sizes. The event size is N = height · width · channels."""

    height: int
    width: int
    channels: int
    batch: int = 8
    rank: int = 25
    diagonal: str = "pixel"  # "pixel": d in [½, 3/2) for every pixel; "scalar": one, FIXED_DIAGONAL
    layout: str = "BNR"  # how P lies in memory: "BNR" contiguous, "BRN" the transposed view of it

    @property
    def N(self) -> int:
        return self.height * self.width * self.channels

    @property
    def id(self) -> str:
        size = f"{self.batch}x{self.height}x{self.width}x{self.channels}"
        return f"{size}-R{self.rank}-{self.diagonal}-{self.layout}"


@dataclass(frozen=True)
class Operator:
    """One benchmarked operator."""

    name: str
    title: str
    peers: tuple[str, ...]  # names of `peers.PEERS` that do the same job, ours first
    inputs: Callable[[Case], Arrays]
    gradients: tuple[str, ...]  # the inputs with respect to which the loss is differentiated
    errors: Callable[[Arrays, Arrays, Arrays], dict[str, float]]  # of inputs, outputs, float64 outputs
    assumptions: str  # what `bytes` and `operations` count
    bytes: Callable[[Case], int] | None = None  # least traffic with memory; none where no floor is claimed
    operations: Callable[[Case], int] | None = None  # additions and multiplications
    needs: str = ""  # a public name of lowrank_mvn without which the operator is not there
    oracle: bool = True  # whether `errors` compares with float64 outputs, or inputs and outputs suffice
    tiny: Case = Case(5, 7, 3, batch=2, rank=3)  # where every peer shows first that it does the same job

    def floor(self, case: Case, copy_bandwidth: float, product_rate: float) -> float | None:
        """Least time [s] on a machine with that copy bandwidth [byte/s] and matrix-product rate [1/s]."""
        if self.bytes is None or self.operations is None:
            return None
        return max(self.bytes(case) / copy_bandwidth, self.operations(case) / product_rate)

    def fault(self, case: Case, outputs: Arrays, errors: dict[str, float], exact: bool) -> str | None:
        """Why a result with these errors is not to be timed, or none.

        `exact` is asked of our own implementation: log p to its float32 rounding and 0.02 nats, relative errors up to
        1e-4. The textbook's formulas are held to what they can reach at d of about one: 1e-4 of log p and 1e-2. At
        d = 1e-5 they are off by thousands of nats; there the error stands beside the time.
        """
        if not all(math.isfinite(value) for value in errors.values()):
            return "not finite, against the float64 oracle: " + _listed(errors)
        bounds = {}
        for name in errors:
            if name in ("log_prob", "entropy"):
                size = float(np.abs(outputs[name]).max(initial=1.0))
                bounds[name] = 0.02 + 4 * EPS * size if exact else 0.02 + 1e-4 * size
            else:
                bounds[name] = 1e-4 if exact else 1e-2
        if not exact and case.diagonal == "scalar":
            return None
        wrong = {name: value for name, value in errors.items() if value > bounds[name]}
        if not wrong:
            return None
        return f"wrong, against the float64 oracle: {_listed(wrong)}; allowed: {_listed(bounds)}"


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items())


# --- Inputs -----------------------------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, *shape: int, std: float = 1.0) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    return values


def _diagonal(rng: np.random.Generator, case: Case) -> np.ndarray:
    if case.diagonal == "scalar":
        return np.full(1, FIXED_DIAGONAL, np.float32)
    return rng.random((case.batch, case.N), dtype=np.float32) + np.float32(0.5)


def density_inputs(case: Case) -> Arrays:
    """loc, P, d, and x: any image where d is about one, one drawn from the model where it is the paper's."""
    rng = np.random.default_rng(0)
    B, N, R = case.batch, case.N, case.rank
    shape = (B, N, R) if case.layout == "BNR" else (B, R, N)
    scalar = case.diagonal == "scalar"
    P = _normal(rng, *shape, std=0.2 if scalar else 0.1)
    loc, d = _normal(rng, B, N, std=0.1), _diagonal(rng, case)
    x = _normal(rng, B, N)
    if scalar:
        omega = _normal(rng, B, R)
        x = loc + np.einsum("bnr,br->bn" if case.layout == "BNR" else "brn,br->bn", P, omega) + np.sqrt(d) * x
    return {"x": x, "loc": loc, "P": P, "d": d}


def sample_inputs(case: Case) -> Arrays:
    """loc, P, d, and the gradient that comes back from what the sample is used for."""
    inputs = density_inputs(case)
    return {"grad_y": inputs.pop("x"), **inputs}


def condition_inputs(case: Case) -> Arrays:
    """As the density's, and a mask: the left half of the image is observed."""
    inputs = density_inputs(case)
    mask = np.zeros((case.channels, case.height, case.width), bool)
    mask[:, :, : case.width // 2 + 1] = True
    return inputs | {"observed": np.broadcast_to(mask.reshape(-1), (case.batch, case.N)).copy()}


def linear_inputs(case: Case) -> Arrays:
    """Features F [B, K, H, W], weights of the factor [R, C, K] and the mean [C, K] with their biases, d and x."""
    rng = np.random.default_rng(0)
    B, C, R, M = case.batch, case.channels, case.rank, case.height * case.width
    features = _normal(rng, B, FEATURES, case.height, case.width)
    weight, bias = _normal(rng, R, C, FEATURES, std=0.02), _normal(rng, R, C, std=0.02)
    mean_weight, mean_bias = _normal(rng, C, FEATURES, std=0.02), _normal(rng, C, std=0.02)
    d = _diagonal(rng, case)
    omega = _normal(rng, B, R)
    # P ω + μ = (W ω + m)ᵀ F̃, so that the draw needs no P either.
    mixed = np.einsum("rck,br->bck", weight, omega) + mean_weight
    y = np.einsum("bck,bkm->bcm", mixed, features.reshape(B, FEATURES, M))
    y += (np.einsum("rc,br->bc", bias, omega) + mean_bias)[..., None]
    x = y.reshape(B, C * M) + np.sqrt(d) * _normal(rng, B, C * M)
    inputs = {"features": features, "weight": weight, "bias": bias, "mean_weight": mean_weight, "mean_bias": mean_bias}
    return inputs | {"d": d, "x": x.astype(np.float32)}


def training_inputs(case: Case) -> Arrays:
    """Images of smooth noise, intensities from 0 to 1."""
    rng = np.random.default_rng(0)
    coarse = _normal(rng, case.batch, case.channels, -(-case.height // 8), -(-case.width // 8))
    fine = coarse.repeat(8, 2).repeat(8, 3)[:, :, : case.height, : case.width]
    return {"x": (1 / (1 + np.exp(-fine))).astype(np.float32)}


# --- Errors -----------------------------------------------------------------------------------------------------


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖ of the worst item of the batch."""
    a, b = (t.reshape(t.shape[0], -1) if t.ndim > 1 else t.reshape(1, -1) for t in (a, b))
    worst = 0.0
    for left, right in zip(a, b, strict=True):
        size, off = float(np.linalg.norm(right)), float(np.linalg.norm(left.astype(np.float64) - right))
        worst = max(worst, off / size if size else off) if math.isfinite(off) else math.nan
        if math.isnan(worst):
            break
    return worst


def oracle_errors(inputs: Arrays, outputs: Arrays, oracle: Arrays) -> dict[str, float]:
    """log_prob and entropy in nats, gradients and everything else relative; the worst of the batch."""
    missing = sorted(set(oracle) ^ set(outputs))
    assert not missing, f"outputs differ from the oracle's in {missing}"
    errors = {}
    for name, b in oracle.items():
        if outputs[name].shape != b.shape:
            errors[name] = math.inf
        elif name in ("log_prob", "entropy"):
            errors[name] = float(np.abs(outputs[name].astype(np.float64) - b).max())
        else:
            errors[name] = relative(outputs[name], b)
    return errors


def sample_errors(inputs: Arrays, outputs: Arrays, oracle: Arrays) -> dict[str, float]:
    """Whether a sample and its gradients belong to one draw of standard normal noise.

    Every library draws its own, so that there are no numbers to compare with. But from grad_P = grad_y ω_pᵀ follows
    ω_p, with it from the sample ω_d, and grad_d = grad_y ω_d / (2√d) has to agree. Moments of the noise are held
    against six standard errors.
    """
    g, loc, d = (inputs[name].astype(np.float64) for name in ("grad_y", "loc", "d"))
    y, grad_P = outputs["y"].astype(np.float64), outputs["grad_P"].astype(np.float64)
    (B, N), R = y.shape, grad_P.shape[2]
    P = inputs["P"] if inputs["P"].shape == (B, N, R) else inputs["P"].swapaxes(1, 2)
    omega_p = np.einsum("bn,bnr->br", g, grad_P) / np.square(g).sum(-1)[:, None]
    omega_d = (y - loc - np.einsum("bnr,br->bn", P.astype(np.float64), omega_p)) / np.sqrt(d)
    errors = {
        "grad_P": relative(grad_P, g[..., None] * omega_p[:, None, :]),
        "grad_loc": relative(outputs["grad_loc"], g),
    }
    if "grad_d" in outputs:
        errors["grad_d"] = relative(outputs["grad_d"], g * omega_d / (2 * np.sqrt(d)))
    off = 0.0
    for noise in (omega_p, omega_d):
        scores = abs(noise.mean()) * math.sqrt(noise.size), abs(noise.var() - 1) * math.sqrt(noise.size / 2)
        off = max(off, *scores)
    errors["noise"] = 0.0 if off <= 6 else math.inf
    return errors


def training_errors(inputs: Arrays, outputs: Arrays, oracle: Arrays) -> dict[str, float]:
    """log p and H of the decoded images against the textbook in float64, at the mean, P and d that the network gave."""
    loc, d = outputs["loc"].astype(np.float64), outputs["d"].astype(np.float64)
    delta = inputs["x"].reshape(loc.shape).astype(np.float64) - loc
    N = loc.shape[1]
    quadratic, logdet = (delta**2 / d).sum(-1), np.log(d).sum(-1)
    if "P" in outputs:
        P = outputs["P"].astype(np.float64)
        scaled = P / d[..., None]
        C = np.eye(P.shape[2]) + scaled.swapaxes(1, 2) @ P
        w = np.einsum("bnr,bn->br", scaled, delta)
        quadratic -= np.einsum("br,br->b", w, np.linalg.solve(C, w[..., None])[..., 0])
        logdet += np.linalg.slogdet(C)[1]
    log_prob = -0.5 * (N * math.log(2 * math.pi) + logdet + quadratic)
    entropy = 0.5 * (N * (1 + math.log(2 * math.pi)) + logdet)
    return {
        "log_prob": float(np.abs(outputs["log_prob"] - log_prob).max()),
        "entropy": float(np.abs(outputs["entropy"] - entropy).max()),
    }


# --- Bytes and operations ---------------------------------------------------------------------------------------


def density_bytes(case: Case, log_prob: bool, backward: bool) -> int:
    P, vector = case.batch * case.N * case.rank, case.batch * case.N
    d = vector if case.diagonal == "pixel" else 0
    passes = 2 if log_prob else 1
    values = passes * (P + d + (2 * vector if log_prob else 0))
    if backward:
        values += 2 * P + 2 * d + (3 * vector if log_prob else 0)
    return FLOAT * values


def density_operations(case: Case, log_prob: bool, backward: bool) -> int:
    thin = 2 * case.batch * case.N * case.rank  # a product of P with one vector
    operations = thin * (case.rank + 1) // 2  # C, which is symmetric
    if log_prob:
        operations += 3 * thin  # w, Pv, g
    if backward:
        operations += thin * case.rank  # PC⁻¹
        operations += 2 * thin if log_prob else 0  # Pv, z vᵀ
        operations += thin if case.diagonal == "pixel" else 0  # π
    return operations


def sample_bytes(case: Case) -> int:
    P, vector = case.batch * case.N * case.rank, case.batch * case.N
    d = vector if case.diagonal == "pixel" else 0
    return FLOAT * (2 * P + 4 * vector + 3 * d)


def sample_operations(case: Case) -> int:
    return 3 * case.batch * case.N * case.rank


def condition_bytes(case: Case) -> int:
    P, vector = case.batch * case.N * case.rank, case.batch * case.N
    d = vector if case.diagonal == "pixel" else 0
    return FLOAT * (3 * P + 6 * vector + 2 * d) + 2 * vector


def condition_operations(case: Case) -> int:
    thin = 2 * case.batch * case.N * case.rank
    observed = (case.width // 2 + 1) / case.width
    return int(thin * (observed * ((case.rank + 1) / 2 + 1) + case.rank + 1))


def linear_bytes(case: Case) -> int:
    M = case.height * case.width
    d = case.batch * case.N if case.diagonal == "pixel" else 0
    return FLOAT * (4 * case.batch * FEATURES * M + 3 * case.batch * case.N + 4 * d)


def linear_operations(case: Case) -> int:
    M, C = case.height * case.width, case.channels
    distinct = C if case.diagonal == "pixel" else 1
    thin = 2 * case.batch * FEATURES * M  # a product of F with one vector
    gram, applied = distinct * thin * (FEATURES + 1) // 2, distinct * thin * FEATURES  # G_c; M_c F̃
    return gram + applied + 6 * C * thin


# --- The operators ----------------------------------------------------------------------------------------------

OURS, TORCH, COMPILE, LINEAR_OPERATOR, NUMPYRO = "ours", "torch", "compile", "linear_operator", "numpyro"
TEXTBOOK, TEXTBOOK_COMPILE, BETA_VAE = "textbook", "textbook_compile", "betavae"

_PASSES = "P is read twice for log p, once for H alone; its gradient is one more read and one write"


def _density(name: str, title: str, log_prob: bool, backward: bool) -> Operator:
    return Operator(
        name=name,
        title=title,
        peers=(OURS, TORCH, COMPILE, LINEAR_OPERATOR, NUMPYRO),
        inputs=density_inputs,
        gradients=(("loc", "P", "d") if log_prob else ("P", "d")) if backward else (),
        errors=oracle_errors,
        bytes=functools.partial(density_bytes, log_prob=log_prob, backward=backward),
        operations=functools.partial(density_operations, log_prob=log_prob, backward=backward),
        assumptions=f"{_PASSES}; x, μ and a per-pixel d are read in each pass; C is symmetric; no cache between passes",
    )


_ALL = (
    _density("log_prob", "log p", log_prob=True, backward=False),
    _density("entropy", "H", log_prob=False, backward=False),
    _density("log_prob_backward", "log p with backward", log_prob=True, backward=True),
    _density("entropy_backward", "H with backward", log_prob=False, backward=True),
    _density("log_prob_entropy_backward", "log p and H with backward", log_prob=True, backward=True),
    Operator(
        name="rsample_backward",
        title="a sample with backward",
        peers=(OURS, TORCH, COMPILE, NUMPYRO),
        inputs=sample_inputs,
        gradients=("loc", "P", "d"),
        errors=sample_errors,
        oracle=False,
        bytes=sample_bytes,
        operations=sample_operations,
        assumptions="P is read and its gradient written once; the noise is drawn again in the backward, never stored",
    ),
    Operator(
        name="condition",
        title="conditional given half of the pixels",
        peers=(OURS, TEXTBOOK, TEXTBOOK_COMPILE),
        inputs=condition_inputs,
        gradients=(),
        errors=oracle_errors,
        bytes=condition_bytes,
        operations=condition_operations,
        assumptions="P is read twice and the conditional's factor written once; the mask is one byte a pixel; "
        "the Gram is of the observed half",
    ),
    Operator(
        name="linear_backward",
        title="head and likelihood with backward",
        peers=(OURS, TORCH, COMPILE, LINEAR_OPERATOR, NUMPYRO),
        inputs=linear_inputs,
        gradients=("features", "weight", "bias", "mean_weight", "mean_bias", "d"),
        errors=oracle_errors,
        bytes=linear_bytes,
        operations=linear_operations,
        assumptions=f"K = {FEATURES} features; they are read twice forward, read and their gradient written backward; "
        "P, which the peers write and read, is not counted",
        needs="LinearFactor",
    ),
    Operator(
        name="train_step",
        title="a training step of SOS-VAE",
        peers=(OURS, BETA_VAE, TORCH),
        inputs=training_inputs,
        gradients=(),
        errors=training_errors,
        oracle=False,
        tiny=Case(16, 16, 1, batch=2, rank=3, diagonal="scalar"),
        assumptions="the paper's network, d = 1e-3; convolutions dominate, no floor is claimed; torch's class stands "
        "in the same network with P made; the β-VAE has the same decoder with independent pixels",
    ),
)

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ALL}


# --- What is run ------------------------------------------------------------------------------------------------

SMALL, BRAIN, CELEBA = Case(64, 64, 1), Case(160, 192, 1), Case(218, 178, 3)  # the paper's three
SQUARES = (Case(128, 128, 3), Case(256, 256, 3, batch=4), Case(512, 512, 3, batch=1))
RANKS = (10, 25, 64)
TRAINED = (replace(SMALL, diagonal="scalar"), replace(CELEBA, batch=2, diagonal="scalar"))
GROWTH = (OURS, TORCH, NUMPYRO)  # peers of the cases in which only R or B differs: the others grow as torch's class


class Entry(NamedTuple):
    """One line of a plan."""

    operator: Operator
    case: Case
    peers: tuple[str, ...]


def default_plan() -> list[Entry]:
    """The plan of `pytest --benchmark`: every operator at CelebA's size, and the growth of one in N, B and R."""
    joint = OPERATORS["log_prob_entropy_backward"]
    plan = [_entry(joint, case) for case in (CELEBA, SMALL, BRAIN)]
    plan += [_entry(joint, replace(CELEBA, diagonal="scalar", layout="BRN"))]
    plan += [Entry(joint, replace(BRAIN, rank=rank), GROWTH) for rank in RANKS if rank != BRAIN.rank]
    plan += [Entry(joint, replace(BRAIN, batch=batch), GROWTH) for batch in (2, 32)]
    plan += [_entry(OPERATORS[name], CELEBA) for name in ("log_prob", "entropy", "rsample_backward", "condition")]
    plan += [
        _entry(OPERATORS["linear_backward"], replace(CELEBA, diagonal=diagonal)) for diagonal in ("scalar", "pixel")
    ]
    plan += [_entry(OPERATORS["train_step"], case) for case in TRAINED]
    return plan


def full_plan() -> list[Entry]:
    """`--benchmark-full`: every operator at all shapes, ranks, diagonals and layouts, with every peer; hours."""
    return list(dict.fromkeys(_entry(operator, case) for operator, case, _ in [*default_plan(), *_grid()]))


def _entry(operator: Operator, case: Case) -> Entry:
    return Entry(operator, case, operator.peers)


def _grid() -> Iterator[Entry]:
    for case in TRAINED:
        yield _entry(OPERATORS["train_step"], replace(case, rank=128))
    for operator in OPERATORS.values():
        if operator.name == "train_step":
            continue
        # A linear factor has no P whose layout could be chosen.
        layouts = ("BNR",) if operator.name == "linear_backward" else ("BNR", "BRN")
        for shape, rank in itertools.product((SMALL, BRAIN, CELEBA, *SQUARES), RANKS):
            for diagonal, layout in itertools.product(("pixel", "scalar"), layouts):
                yield _entry(operator, replace(shape, rank=rank, diagonal=diagonal, layout=layout))
