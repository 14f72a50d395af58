"""Distributions of every kind of parameters, and the comparison with a new object over the same; without tests."""

import torch
import torch.distributions as td
from torch import nn

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal

B, N, R, K, CHANNELS = 2, 12, 3, 4, 2
STANDARD = td.MultivariateNormal(torch.zeros(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64))


def leaf(*shape, positive=False):
    t = torch.randn(shape, dtype=torch.float64)
    return nn.Parameter(t.abs() + 0.5 if positive else t)


# --- What there is to change: every parameter of every kind, by name ------------------------------------------------


def dense(d_shape=(B, N), batch=(B,)):
    leaves = {"loc": leaf(*batch, N), "P": leaf(*batch, N, R), "d": leaf(*d_shape, positive=True)}
    return leaves, lambda: (leaves["loc"], leaves["P"], leaves["d"])


def transposed():
    leaves = {"loc": leaf(N), "P": leaf(B, R, N), "d": leaf(N, positive=True)}
    return leaves, lambda: (leaves["loc"], leaves["P"].mT, leaves["d"].view(1, N))


def views():
    """All three are views of one vector, as of a flattened model."""
    flat = leaf(N + N * R + N, positive=True)
    leaves = {"flat": flat}
    return leaves, lambda: (flat[:N], flat[N : N + N * R].view(N, R), flat[-N:])


def linear(convolution=False, mean=False):
    pixels = (3, 2)
    weights = (R * CHANNELS, K, 1, 1) if convolution else (R, CHANNELS, K)
    leaves = {
        "features": leaf(B, K, *pixels),
        "weight": leaf(*weights),
        "bias": leaf(R * CHANNELS) if convolution else leaf(R, CHANNELS),
        "d": leaf(1, positive=True),
    }
    leaves |= {"mean_weight": leaf(CHANNELS, K, 1, 1), "mean_bias": leaf(CHANNELS)} if mean else {"loc": leaf(N)}

    def arguments():
        v = leaves
        loc = LinearMean(v["features"], v["mean_weight"], v["mean_bias"]) if mean else v["loc"]
        return loc, LinearFactor(v["features"], v["weight"], v["bias"], channels=CHANNELS), v["d"]

    return leaves, arguments


KINDS = {
    "dense": dense,
    "one-d": lambda: dense((B, 1)),
    "0d": lambda: dense(()),
    "broadcast": lambda: dense((N,), batch=()),
    "transposed": transposed,
    "views": views,
    "linear": linear,
    "convolution": lambda: linear(convolution=True),
    "linear-mean": lambda: linear(mean=True),
}
# --- What it was asked before ---------------------------------------------------------------------------------------


def backwards(*results):
    sum(t.sum() for t in results).backward()


CALLS = {
    "log_prob": lambda p, x: p.log_prob(x),
    "entropy": lambda p, x: p.entropy(),
    "both": lambda p, x: (p.log_prob(x), p.entropy()),
    "entropy-first": lambda p, x: (p.entropy(), p.log_prob(x)),
    "joint": lambda p, x: p.log_prob_and_entropy(x),
    "no_grad": lambda p, x: torch.no_grad()(CALLS["both"])(p, x),
    "inference": lambda p, x: torch.inference_mode()(CALLS["entropy-first"])(p, x),
    "backward": lambda p, x: backwards(*CALLS["both"](p, x)),
    "backward-twice": lambda p, x: (CALLS["backward"](p, x), CALLS["backward"](p, x)),
    "retained": lambda p, x: p.log_prob(x).sum().backward(retain_graph=True),
    "of-the-value": lambda p, x: torch.autograd.functional.vjp(lambda x: p.log_prob(x).sum(), x),
    "expanded": lambda p, x: CALLS["both"](p.expand((3, B)), x),
}
ASKED = {
    "log_prob-entropy": lambda p, x: (p.log_prob(x), p.entropy()),
    "entropy-log_prob": lambda p, x: (p.entropy(), p.log_prob(x)),
    "joint": lambda p, x: p.log_prob_and_entropy(x),
    "no_grad": lambda p, x: torch.no_grad()(lambda: (p.log_prob(x), p.entropy()))(),
    "expanded": lambda p, x: ASKED["entropy-log_prob"](p.expand((3, B)), x),
}


def answers(p, x, leaves, asked):
    """Values and the gradients of their sum."""
    values = ASKED[asked](p, x)
    if not values[0].requires_grad:
        return values
    total = sum(t.sum() for t in values)
    return [*values, *torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)]


def made_of(p):
    """What else there is of the parameters."""
    omega = torch.linspace(-1, 1, R, dtype=torch.float64), torch.linspace(1, 2, N, dtype=torch.float64)
    sample, divergence = p.rsample(noise=omega), td.kl_divergence(p, STANDARD)
    matrices = p.covariance_matrix, p.precision_matrix, p.scale_tril, p._capacitance_tril
    return p.loc, p.mean, p.cov_factor, p.cov_diag, p.variance, *matrices, sample, divergence


def same(p, arguments, x, leaves, asked="log_prob-entropy", more=True):
    fresh = LowRankMultivariateNormal(*arguments())
    found, expected = (answers(q, x, leaves, asked) for q in (p, fresh))
    if more:
        found, expected = [*found, *made_of(p)], [*expected, *made_of(fresh)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
