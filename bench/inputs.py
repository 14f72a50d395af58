"""Sizes and inputs of the benchmarked operators, by a generator with a fixed seed: the same numbers for every peer."""

from dataclasses import dataclass

import numpy as np

__all__ = [
    "FIXED_DIAGONAL",
    "Arrays",
    "Case",
    "K",
    "condition",
    "density",
    "linear",
    "sample",
    "stencil",
    "stencil_sample",
    "training",
]

K = 64  # features of the linear factor, the paper's number
FIXED_DIAGONAL = 1e-5  # the paper's d for all pixels

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One set of sizes. The event size is N = height · width · channels."""

    height: int
    width: int
    channels: int
    batch: int = 8
    rank: int = 25
    diagonal: str = "pixel"  # "pixel": d in [½, 3/2) for every pixel; "scalar": one d, the paper's
    layout: str = "BNR"  # how P lies in memory: "BNR" contiguous, "BRN" the transposed view of it

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def N(self) -> int:
        return self.pixels * self.channels

    @property
    def id(self) -> str:
        size = f"{self.batch}x{self.height}x{self.width}x{self.channels}"
        return f"{size}-R{self.rank}-{self.diagonal}-{self.layout}"


def _normal(rng: np.random.Generator, *shape: int, std: float = 1.0) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    return values


def _diagonal(rng: np.random.Generator, case: Case) -> np.ndarray:
    if case.diagonal == "scalar":
        return np.full(1, FIXED_DIAGONAL, np.float32)
    return rng.random((case.batch, case.N), dtype=np.float32) + np.float32(0.5)


def density(case: Case) -> Arrays:
    """loc, P, d, and x: any image where d is about one, one drawn from the model where d is the paper's."""
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


def sample(case: Case) -> Arrays:
    """loc, P, d, and the gradient that comes back from what the sample is used for."""
    inputs = density(case)
    return {"grad_y": inputs.pop("x"), **inputs}


def condition(case: Case) -> Arrays:
    """Those of the density and a mask: the left half of the image is observed."""
    inputs = density(case)
    mask = np.zeros((case.channels, case.height, case.width), bool)
    mask[:, :, : case.width // 2 + 1] = True
    return inputs | {"observed": np.broadcast_to(mask.reshape(-1), (case.batch, case.N)).copy()}


def stencil(case: Case) -> Arrays:
    """x, loc and the weights of a 3×3 neighbourhood of each channel: log t [B, channels, H, W], s of 4 neighbours."""
    rng = np.random.default_rng(0)
    image = (case.height, case.width)
    x, loc = _normal(rng, case.batch, case.N), _normal(rng, case.batch, case.N, std=0.1)
    log_diagonal = _normal(rng, case.batch, case.channels, *image, std=0.1)
    neighbours = _normal(rng, case.batch, case.channels, 4, *image, std=0.1)
    return {"x": x, "loc": loc, "log_diagonal": log_diagonal, "neighbours": neighbours}


def stencil_sample(case: Case) -> Arrays:
    """The same and the noise of 64 samples in place of x."""
    inputs = stencil(case)
    del inputs["x"]
    return inputs | {"omega": _normal(np.random.default_rng(1), 64, case.batch, case.N)}


def linear(case: Case) -> Arrays:
    """F [B, K, H, W], weights of the factor [R, channels, K] and the mean [channels, K], their biases, d and x."""
    rng = np.random.default_rng(0)
    B, R, channels = case.batch, case.rank, case.channels
    F = _normal(rng, B, K, case.height, case.width)
    weight, bias = _normal(rng, R, channels, K, std=0.02), _normal(rng, R, channels, std=0.02)
    mean_weight, mean_bias = _normal(rng, channels, K, std=0.02), _normal(rng, channels, std=0.02)
    d = _diagonal(rng, case)
    omega = _normal(rng, B, R)
    # P ω + μ = (W ω + m)ᵀ F̃, so that the draw needs no P either.
    mixed = np.einsum("rck,br->bck", weight, omega) + mean_weight
    y = np.einsum("bck,bkm->bcm", mixed, F.reshape(B, K, case.pixels))
    y += (np.einsum("rc,br->bc", bias, omega) + mean_bias)[..., None]
    x = y.reshape(B, case.N) + np.sqrt(d) * _normal(rng, B, case.N)
    inputs = {"features": F, "weight": weight, "bias": bias, "mean_weight": mean_weight, "mean_bias": mean_bias}
    return inputs | {"d": d, "x": x.astype(np.float32)}


def training(case: Case) -> Arrays:
    """Images of smooth noise, intensities from 0 to 1."""
    rng = np.random.default_rng(0)
    coarse = _normal(rng, case.batch, case.channels, -(-case.height // 8), -(-case.width // 8))
    fine = coarse.repeat(8, 2).repeat(8, 3)[:, :, : case.height, : case.width]
    return {"x": (1 / (1 + np.exp(-fine))).astype(np.float32)}
