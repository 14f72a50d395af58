"""How NumPyro does the benchmarked jobs: its `LowRankMultivariateNormal` under `jax.jit`, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from .operators import Arrays, Case, Operator
from .peers import Job

__all__ = ["build"]


def build(peer: str, operator: Operator, case: Case, inputs: Arrays, device: str) -> Job:
    if device != "cpu" and jax.default_backend() == "cpu":
        raise NotImplementedError("this jax sees no GPU")
    return _Job(operator, case, inputs)


class _Job(Job):
    def __init__(self, operator: Operator, case: Case, inputs: Arrays) -> None:
        self.rest = {name: jnp.asarray(value) for name, value in inputs.items()}
        self.leaves = {name: self.rest.pop(name) for name in operator.leaves(case)}
        self.key = jax.random.PRNGKey(0)
        self.function = jax.jit(_function(operator, case))

    def call(self) -> Any:
        self.key, key = jax.random.split(self.key)
        return jax.block_until_ready(self.function(self.leaves, self.rest, key))

    def outputs(self) -> Arrays:
        return {name: np.asarray(value) for name, value in self.call().items()}


def _function(operator: Operator, case: Case) -> Any:
    def transposed(P: Any) -> Any:
        return P if case.layout == "BNR" else jnp.swapaxes(P, -1, -2)

    def distribution(a: Any) -> Any:
        if "features" in a:
            F = a["features"]
            P = jnp.einsum("rck,bkhw->brchw", a["weight"], F) + a["bias"][:, :, None, None]
            loc = jnp.einsum("ck,bkhw->bchw", a["mean_weight"], F) + a["mean_bias"][:, None, None]
            P = jnp.swapaxes(P.reshape(case.batch, case.rank, case.N), -1, -2)
            loc = loc.reshape(case.batch, case.N)
        else:
            loc, P = a["loc"], transposed(a["P"])
        return dist.LowRankMultivariateNormal(loc, P, jnp.broadcast_to(a["d"], loc.shape), validate_args=False)

    def outputs(leaves: Any, rest: Any, key: Any) -> Any:
        a = {**leaves, **rest}
        p = distribution(a)
        if not operator.terms:
            return {"y": p.rsample(key)}
        found = {"log_prob": lambda: p.log_prob(a["x"]), "entropy": p.entropy}
        return {name: found[name]() for name in operator.terms}

    def loss(leaves: Any, rest: Any, key: Any) -> Any:
        out = outputs(leaves, rest, key)
        if "y" in out:
            return (out["y"] * rest["grad_y"]).sum(), out
        return sum(value.sum() if name == "entropy" else -value.sum() for name, value in out.items()), out

    def with_backward(leaves: Any, rest: Any, key: Any) -> Any:
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(leaves, rest, key)
        if "P" in grads:
            grads["P"] = transposed(grads["P"])
        return {**out, **{f"grad_{name}": grad for name, grad in grads.items()}}

    return with_backward if operator.gradients else outputs
