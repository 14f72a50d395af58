"""How the torch peers, our own implementation and the float64 oracle do the benchmarked jobs."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor, nn

from .operators import Arrays, Case, Operator
from .peers import Job

__all__ = ["build"]

Function = Callable[..., dict[str, Tensor]]


def build(peer: str, operator: Operator, case: Case, inputs: Arrays, device: str) -> Job:
    """The job of `peer`; see `peers.build`."""
    if operator.name == "train_step":
        from .training import TrainingJob

        return TrainingJob(case, inputs, device, peer)
    make = _FUNCTIONS.get(operator.name, _density)
    if operator.name.startswith("stencil"):
        from .peers_stencil import function as make
    return _Job(make(operator, peer), operator, case, inputs, device, peer)


class _Job(Job):
    """A function of the operator's inputs that returns its outputs by name, and its gradients."""

    def __init__(
        self, function: Function, operator: Operator, case: Case, inputs: Arrays, device: str, peer: str
    ) -> None:
        # Static shapes: torch.compile is given what it can make the most of.
        self.function = torch.compile(function, dynamic=False) if peer.endswith("compile") else function
        self.inputs: dict[str, Tensor] = {}
        for name, array in inputs.items():
            t = torch.from_numpy(array).to(device)
            if peer == "oracle" and t.is_floating_point():
                t = t.double()
            self.inputs[name] = t.mT if name == "P" and case.layout == "BRN" else t
        self.leaves = {name: self.inputs[name].requires_grad_() for name in operator.leaves(case)}

    def call(self) -> dict[str, Tensor]:
        if not self.leaves:
            with torch.no_grad():
                return self.function(**self.inputs)
        out = self.function(**self.inputs)
        loss = out.pop("loss")
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        return {**out, **{f"grad_{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}}

    def outputs(self) -> Arrays:
        return {name: t.detach().cpu().numpy() for name, t in self.call().items()}


def _public(name: str) -> Any:
    import lowrank_mvn

    if not hasattr(lowrank_mvn, name):
        raise NotImplementedError(f"this lowrank_mvn has no {name}")
    return getattr(lowrank_mvn, name)


def _distribution(peer: str) -> Callable[[Any, Any, Tensor], Any]:
    """(loc, P, d) -> an object with log_prob, entropy and rsample."""
    if peer == "ours":
        cls = _public("LowRankMultivariateNormal")
        return lambda loc, P, d: cls(loc, P, d, validate_args=False)
    if peer == "linear_operator":
        return _LinearOperator
    return lambda loc, P, d: td.LowRankMultivariateNormal(loc, P, d.expand_as(loc), validate_args=False)


class _LinearOperator:
    def __init__(self, loc: Tensor, P: Tensor, d: Tensor) -> None:
        from linear_operator import operators as lo

        self.loc = loc
        root, diagonal = lo.LowRankRootLinearOperator(P), lo.DiagLinearOperator(d.expand_as(loc))
        self.covariance = lo.LowRankRootAddedDiagLinearOperator(root, diagonal)

    def log_prob(self, x: Tensor) -> Tensor:
        mahalanobis, logdet = self.covariance.inv_quad_logdet((x - self.loc).unsqueeze(-1), logdet=True)
        return -0.5 * (self.loc.shape[-1] * math.log(2 * math.pi) + logdet + mahalanobis)

    def entropy(self) -> Tensor:
        logdet = self.covariance.inv_quad_logdet(None, logdet=True)[1]
        return 0.5 * (self.loc.shape[-1] * (1 + math.log(2 * math.pi)) + logdet)


def _terms(operator: Operator, p: Any, x: Tensor) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if "log_prob" in operator.terms:
        out["log_prob"] = p.log_prob(x)
    if "entropy" in operator.terms:
        out["entropy"] = p.entropy()
    if operator.gradients:
        out["loss"] = sum((t.sum() if name == "entropy" else -t.sum()) for name, t in out.items())  # type: ignore[assignment]
    return out


def _density(operator: Operator, peer: str) -> Function:
    distribution = _distribution(peer)
    return lambda x, loc, P, d: _terms(operator, distribution(loc, P, d), x)


def _sample(operator: Operator, peer: str) -> Function:
    distribution = _distribution(peer)

    def function(grad_y: Tensor, loc: Tensor, P: Tensor, d: Tensor) -> dict[str, Tensor]:
        y = distribution(loc, P, d).rsample()
        return {"y": y, "loss": (y * grad_y).sum()}

    return function


def textbook_condition(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, observed: Tensor) -> dict[str, Tensor]:
    """Equations 6 and 7 of the paper by Woodbury's identity, and the factor of the conditional covariance.

    Neither torch's class nor the other libraries have conditionals; this is what a user would write.
    """
    weighted = P * (observed / d).unsqueeze(-1)
    L = torch.linalg.cholesky(weighted.mT @ P + torch.eye(P.shape[-1], dtype=P.dtype, device=P.device))
    w = (weighted.mT @ (x - loc).unsqueeze(-1)).squeeze(-1)
    v = torch.cholesky_solve(w.unsqueeze(-1), L).squeeze(-1)
    factor = torch.linalg.solve_triangular(L, P.mT, upper=False).mT * ~observed.unsqueeze(-1)
    mean = torch.where(observed, x, loc + (P @ v.unsqueeze(-1)).squeeze(-1))
    return {"mean": mean, "factor": factor, "diagonal": (d * ~observed).expand_as(loc)}


def _condition(operator: Operator, peer: str) -> Function:
    if peer != "ours":
        return textbook_condition
    condition = _public("condition")

    def function(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, observed: Tensor) -> dict[str, Tensor]:
        return dict(zip(("mean", "factor", "diagonal"), condition(x, observed, loc, P, d), strict=True))

    return function


def _linear(operator: Operator, peer: str) -> Function:
    distribution = _distribution(peer)

    def function(
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_weight: Tensor,
        mean_bias: Tensor,
        d: Tensor,
        x: Tensor,
    ) -> dict[str, Tensor]:
        if peer == "ours":
            mean = _public("LinearMean")(features, mean_weight, mean_bias)
            return _terms(operator, distribution(mean, _public("LinearFactor")(features, weight, bias), d), x)
        loc = nn.functional.conv2d(features, mean_weight[..., None, None], mean_bias).flatten(1)
        P = nn.functional.conv2d(features, weight.flatten(0, 1)[..., None, None], bias.flatten())
        P = P.unflatten(1, bias.shape).flatten(2).mT  # the view of [B, R, N] that a user has, not copied
        return _terms(operator, distribution(loc, P, d), x)

    return function


_FUNCTIONS = {"rsample_backward": _sample, "condition": _condition, "linear_backward": _linear}
