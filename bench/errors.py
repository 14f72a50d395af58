"""How far results are from what they should be, and which of them are not to be timed."""

import math

import numpy as np

from .inputs import Arrays, Case

__all__ = ["fault", "oracle", "relative", "sample", "training"]

EPS = float(np.finfo(np.float32).eps)
NATS = ("log_prob", "entropy")  # absolute errors; the others are relative


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖ of the worst item of the batch."""
    worst = 0.0
    for left, right in zip(np.atleast_2d(a), np.atleast_2d(b), strict=True):
        size, off = float(np.linalg.norm(right)), float(np.linalg.norm(left.astype(np.float64) - right))
        if math.isnan(off):
            return math.nan
        worst = max(worst, off / size if size else off)
    return worst


def oracle(inputs: Arrays, outputs: Arrays, exact: Arrays) -> dict[str, float]:
    """log_prob and entropy in nats, gradients and everything else relative; the worst of the batch."""
    different = sorted(set(exact) ^ set(outputs))
    assert not different, f"outputs differ from the oracle's in {different}"
    errors = {}
    for name, b in exact.items():
        if outputs[name].shape != b.shape:
            errors[name] = math.inf
        elif name in NATS:
            errors[name] = float(np.abs(outputs[name].astype(np.float64) - b).max())
        else:
            errors[name] = relative(outputs[name], b)
    return errors


def sample(inputs: Arrays, outputs: Arrays, exact: Arrays) -> dict[str, float]:
    """Whether a sample and its gradients belong to one draw of standard normal noise.

    Every library draws its own, so there are no numbers to compare with. But grad_P = grad_y ω_pᵀ gives ω_p, the sample
    then gives ω_d, and grad_d = grad_y ω_d / (2√d) has to agree. Moments of the noise are held against six standard
    errors.
    """
    g, loc, d = (inputs[name].astype(np.float64) for name in ("grad_y", "loc", "d"))
    y, grad_P = outputs["y"].astype(np.float64), outputs["grad_P"].astype(np.float64)
    P = inputs["P"] if inputs["P"].shape == grad_P.shape else inputs["P"].swapaxes(1, 2)
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
        off = max(off, abs(noise.mean()) * math.sqrt(noise.size), abs(noise.var() - 1) * math.sqrt(noise.size / 2))
    errors["noise"] = 0.0 if off <= 6 else math.inf
    return errors


def training(inputs: Arrays, outputs: Arrays, exact: Arrays) -> dict[str, float]:
    """log p and H of the decoded images against the textbook in float64, at the mean, P and d that the network gave."""
    loc, d = outputs["loc"].astype(np.float64), outputs["d"].astype(np.float64)
    delta = inputs["x"].reshape(loc.shape).astype(np.float64) - loc
    N = loc.shape[1]
    mahalanobis, logdet = (delta**2 / d).sum(-1), np.log(d).sum(-1)
    if "P" in outputs:
        P = outputs["P"].astype(np.float64)
        scaled = P / d[..., None]
        C = np.eye(P.shape[2]) + scaled.swapaxes(1, 2) @ P
        w = np.einsum("bnr,bn->br", scaled, delta)
        mahalanobis -= np.einsum("br,br->b", w, np.linalg.solve(C, w[..., None])[..., 0])
        logdet += np.linalg.slogdet(C)[1]
    log_prob = -0.5 * (N * math.log(2 * math.pi) + logdet + mahalanobis)
    entropy = 0.5 * (N * (1 + math.log(2 * math.pi)) + logdet)
    return oracle(inputs, {name: outputs[name] for name in NATS}, {"log_prob": log_prob, "entropy": entropy})


def fault(case: Case, outputs: Arrays, errors: dict[str, float], exact: bool) -> str | None:
    """Why a result with these errors is not to be timed, or none.

    `exact` is asked of our own implementation: log p to its float32 rounding and 0.02 nats, relative errors up to 1e-4.
    The textbook's formulas are held to what they can reach at d of about one: 1e-4 of log p and 1e-2. At d = 1e-5 they
    are off by thousands of nats; there the error stands beside the time.
    """
    if not all(map(math.isfinite, errors.values())):
        return "not finite, against the float64 oracle: " + _listed(errors)
    if not exact and case.diagonal == "scalar":
        return None
    bounds = {}
    for name in errors:
        if name in NATS:
            size = float(np.abs(outputs[name]).max(initial=1.0))
            bounds[name] = 0.02 + (4 * EPS if exact else 1e-4) * size
        else:
            bounds[name] = 1e-4 if exact else 1e-2
    wrong = {name: value for name, value in errors.items() if value > bounds[name]}
    return f"wrong, against the float64 oracle: {_listed(wrong)}; allowed: {_listed(bounds)}" if wrong else None


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items())
