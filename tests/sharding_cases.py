"""What a process of `test_lowrank_sharding.py` runs: the same call on whole tensors and on shards of the batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributions as td

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal, LowRankMultivariateStudentT

B, N, R, K, CHANNELS = 4, 12, 3, 4, 2


def dense(items=B, d_shape=(N,)):
    made = {"loc": torch.randn(items, N), "P": torch.randn(items, R, N).mT, "d": 0.5 + torch.rand(items, *d_shape)}
    return {name: t.double() for name, t in made.items()}


def of_dense(t):
    return t["loc"], t["P"], t["d"]


def linear(items=(), d_shape=(B, N)):
    made = {
        "features": torch.randn(B, K, 3, 2),
        "weight": torch.randn(*items, R, CHANNELS, K),
        "bias": torch.randn(*items, R, CHANNELS),
        "mean_weight": torch.randn(CHANNELS, K),
        "mean_bias": torch.randn(CHANNELS),
        "d": 0.5 + torch.rand(d_shape),
    }
    return {name: t.double() for name, t in made.items()}


def of_linear(t):
    factor = LinearFactor(t["features"], t["weight"], t["bias"])
    return LinearMean(t["features"], t["mean_weight"], t["mean_bias"]), factor, t["d"]


# name: tensors, what a distribution is made of, and the tensors that all items share
KINDS = {
    "dense": (dense, of_dense, ()),
    "uneven-item-d": (lambda: dense(B + 1, (1,)), of_dense, ()),
    "number-d": (dense, lambda t: (t["loc"], t["P"], 0.3), ()),
    "linear": (linear, of_linear, ("weight", "bias", "mean_weight", "mean_bias")),
    "linear-items": (lambda: linear((B,), (1,)), of_linear, ("mean_weight", "mean_bias", "d")),
}


def seeded(function):
    def call(*arguments):
        torch.manual_seed(1)
        return function(*arguments)

    return call


def observed(x):
    return x > 0


def heavy(p):
    """The t of the same parameters."""
    loc, factor, local, _ = p._parameters
    return LowRankMultivariateStudentT(3.0, loc.given, factor.given, local.variance())


CALLS = {
    "log_prob": lambda p, x: p.log_prob(x),
    "entropy": lambda p, x: p.entropy(),
    "kept": lambda p, x: p.log_prob(x) + p.entropy() + p.log_prob(2 * x),
    "rsample": seeded(lambda p, x: p.rsample()),
    "condition": lambda p, x: p.condition(x, observed(x)).loc,
    "condition-diagonal": lambda p, x: p.condition(x, observed(x)).variance,
    "variance": lambda p, x: p.variance,
    "covariance_row": lambda p, x: p.covariance_row(3),
    "gram": lambda p, x: p.factor_gram(),
    "kl": lambda p, x: td.kl_divergence(p, p.expand(p.batch_shape)),
    "t log_prob": lambda p, x: heavy(p).log_prob(x) + heavy(p).entropy(),
    "t rsample": seeded(lambda p, x: heavy(p).rsample()),
    "t condition": lambda p, x: heavy(p).condition(x, observed(x)).variance,
}


MAIN = "log_prob", "rsample", "condition"  # of every kind


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def process(rank, world, port, kinds, failures):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    for kind in kinds:
        make, arguments, shared = KINDS[kind]
        torch.manual_seed(0)
        tensors = make()
        x = torch.randn(len(next(iter(tensors.values()))), N, dtype=torch.float64)

        def divided(name, t, shared=shared):
            return distribute_tensor(t, mesh, [Replicate() if name in shared else Shard(0)]).requires_grad_()

        for name, call in CALLS.items():
            if kind not in ("dense", "linear") and name not in MAIN:
                continue
            try:
                expected, found = {}, {}
                for result, place in ((expected, lambda n, t: t.clone().requires_grad_()), (found, divided)):
                    leaves = {n: place(n, t) for n, t in {**tensors, "x": x}.items()}
                    p = LowRankMultivariateNormal(*arguments(leaves), validate_args=True)
                    value = call(p, leaves["x"])
                    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
                    if result is found:
                        weights = distribute_tensor(weights, mesh, value.placements)
                    (value * weights).sum().backward()
                    result["value"] = value
                    result |= {f"grad_{n}": t.grad for n, t in leaves.items() if t.grad is not None}
                for n, t in expected.items():
                    torch.testing.assert_close(whole(found[n]), t, msg=lambda m, n=n: f"{n}: {m}")
                if world > 1 and name in MAIN:
                    assert found["value"].placements == (Shard(0),), found["value"].placements
            except Exception as error:
                failures.put(f"{kind} {name}: {type(error).__name__} {error}"[:400])
    samples(mesh, failures)
    dist.destroy_process_group()
    # The mesh keeps gloo's threads, which may drop the last tensors while Python ends: torch 2.13 aborts then, one time
    # in seven. What failed is in the pipe already.
    os._exit(0)


def samples(mesh, failures):
    """Whole parameters, and values that are divided otherwise than by items: they are gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    tensors, x = dense(), torch.randn(6, B, N, dtype=torch.float64)
    expected = LowRankMultivariateNormal(*of_dense(tensors)).log_prob(x)
    try:
        p = LowRankMultivariateNormal(
            *of_dense({n: distribute_tensor(t, mesh, [Replicate()]) for n, t in tensors.items()})
        )
        for dim in range(3):
            torch.testing.assert_close(whole(p.log_prob(distribute_tensor(x, mesh, [Shard(dim)]))), expected)
        for call in (lambda: p.log_prob(x), lambda: p.rsample(noise=(x[..., :R], x))):
            with pytest.raises(TypeError, match="expected distributed tensors or none"):
                call()
        negative = [distribute_tensor(-t, mesh, [Shard(0)]) for t in of_dense(tensors)]
        with pytest.raises(ValueError, match="cov_diag"):
            LowRankMultivariateNormal(*negative, validate_args=True)
    except Exception as error:
        failures.put(f"samples: {type(error).__name__} {error}"[:400])


__all__ = ["KINDS", "process"]
