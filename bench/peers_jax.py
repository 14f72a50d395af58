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
        self.operator = operator
        # One value of d for all pixels is the paper's: it is not learned.
        names = [name for name in operator.gradients if name != "d" or case.diagonal == "pixel"]
        arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
        self.leaves = {name: arrays.pop(name) for name in names}
        self.rest = arrays
        self.key = jax.random.PRNGKey(0)
        self.function = jax.jit(_function(operator, case))

    def call(self) -> Any:
        self.key, key = jax.random.split(self.key)
        return jax.block_until_ready(self.function(self.leaves, self.rest, key))

    def outputs(self) -> Arrays:
        return {name: np.asarray(value) for name, value in self.call().items()}


def _function(operator: Operator, case: Case) -> Any:
    def distribution(loc: Any, P: Any, d: Any) -> Any:
        return dist.LowRankMultivariateNormal(loc, P, jnp.broadcast_to(d, loc.shape), validate_args=False)

    def factor(P: Any) -> Any:
        return P if case.layout == "BNR" else jnp.swapaxes(P, -1, -2)

    def density(leaves: Any, rest: Any, key: Any) -> Any:
        a = {**leaves, **rest}
        D = distribution(a["loc"], factor(a["P"]), a["d"])
        out = {}
        if "log_prob" in operator.name:
            out["log_prob"] = D.log_prob(a["x"])
        if "entropy" in operator.name:
            out["entropy"] = D.entropy()
        return out

    def linear(leaves: Any, rest: Any, key: Any) -> Any:
        a = {**leaves, **rest}
        F = a["features"]
        P = jnp.einsum("rck,bkhw->brchw", a["weight"], F) + a["bias"][:, :, None, None]
        loc = jnp.einsum("ck,bkhw->bchw", a["mean_weight"], F) + a["mean_bias"][:, None, None]
        P = P.reshape(case.batch, case.rank, case.N)
        D = distribution(loc.reshape(case.batch, case.N), jnp.swapaxes(P, -1, -2), a["d"])
        return {"log_prob": D.log_prob(a["x"]), "entropy": D.entropy()}

    def sample(leaves: Any, rest: Any, key: Any) -> Any:
        a = {**leaves, **rest}
        return {"y": distribution(a["loc"], factor(a["P"]), a["d"]).rsample(key)}

    def loss(leaves: Any, rest: Any, key: Any) -> Any:
        if operator.name == "rsample_backward":
            out = sample(leaves, rest, key)
            return (out["y"] * rest["grad_y"]).sum(), out
        out = (linear if operator.name == "linear_backward" else density)(leaves, rest, key)
        return out.get("entropy", jnp.zeros(1)).sum() - out.get("log_prob", jnp.zeros(1)).sum(), out

    def with_backward(leaves: Any, rest: Any, key: Any) -> Any:
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(leaves, rest, key)
        grads = {f"grad_{name}": grad for name, grad in grads.items()}
        if "grad_P" in grads and case.layout == "BRN":
            grads["grad_P"] = jnp.swapaxes(grads["grad_P"], -1, -2)
        return {**out, **grads}

    return with_backward if operator.gradients else density
