"""How the torch peers, our own implementation and the float64 oracle do the benchmarked jobs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from .operators import FEATURES, Arrays, Case, Operator
from .peers import Job

__all__ = ["build", "job"]

Function = Callable[..., dict[str, Tensor]]


def build(peer: str, operator: Operator, case: Case, inputs: Arrays, device: str) -> Job:
    """The job of `peer`; see `peers.build`."""
    if operator.needs and peer == "ours":
        _public(operator.needs)
    if operator.name.startswith("train_"):
        return _Training(operator, case, inputs, device, peer)
    make = _FUNCTIONS[operator.name]
    return job(make(operator, peer), operator, case, inputs, device, compiled=peer.endswith("compile"), peer=peer)


def job(
    function: Function,
    operator: Operator,
    case: Case,
    inputs: Arrays,
    device: str,
    *,
    compiled: bool = False,
    peer: str = "",
) -> Job:
    """A job from a function of the operator's inputs that returns its outputs by name."""
    return _Job(function, operator, case, inputs, device, compiled, torch.float64 if peer == "oracle" else None)


class _Job(Job):
    def __init__(
        self,
        function: Function,
        operator: Operator,
        case: Case,
        inputs: Arrays,
        device: str,
        compiled: bool,
        dtype: torch.dtype | None,
    ) -> None:
        # Static shapes: torch.compile is given what it can make the most of.
        self.function = torch.compile(function, dynamic=False) if compiled else function
        self.inputs: dict[str, Tensor] = {}
        for name, array in inputs.items():
            t = torch.from_numpy(array).to(device)
            if t.is_floating_point():
                t = t.to(dtype or t.dtype)
            self.inputs[name] = t.mT if name == "P" and case.layout == "BRN" else t
        # One value of d for all pixels is the paper's: it is not learned.
        names = [name for name in operator.gradients if name != "d" or case.diagonal == "pixel"]
        self.leaves = {name: self.inputs[name].requires_grad_() for name in names}

    def call(self) -> dict[str, Tensor]:
        if not self.leaves:
            with torch.no_grad():
                return self.function(**self.inputs)
        out = self.function(**self.inputs)
        loss = out.pop("loss")
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        return {**out, **{f"grad_{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}}

    def outputs(self) -> Arrays:
        return {name: t.detach().cpu().numpy() for name, t in self.call().items() if name != "loss"}


# --- Density ----------------------------------------------------------------------------------------------------


def _public(name: str) -> Any:
    import lowrank_mvn

    if not hasattr(lowrank_mvn, name):
        raise NotImplementedError(f"this lowrank_mvn has no {name}")
    return getattr(lowrank_mvn, name)


def _distribution(peer: str) -> Callable[[Tensor, Tensor, Tensor], Any]:
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
        quadratic, logdet = self.covariance.inv_quad_logdet((x - self.loc).unsqueeze(-1), logdet=True)
        return -0.5 * (self.loc.shape[-1] * 1.8378770664093453 + logdet + quadratic)  # log 2π

    def entropy(self) -> Tensor:
        logdet = self.covariance.inv_quad_logdet(None, logdet=True)[1]
        return 0.5 * (self.loc.shape[-1] * 2.8378770664093453 + logdet)  # 1 + log 2π


def _terms(operator: Operator, D: Any, x: Tensor) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if "log_prob" in operator.name or operator.name == "linear_backward":
        out["log_prob"] = D.log_prob(x)
    if "entropy" in operator.name or operator.name == "linear_backward":
        out["entropy"] = D.entropy()
    out["loss"] = sum((t.sum() if name == "entropy" else -t.sum()) for name, t in out.items())  # type: ignore[assignment]
    return out


def _density(operator: Operator, peer: str) -> Function:
    distribution = _distribution(peer)

    def function(x: Tensor, loc: Tensor, P: Tensor, d: Tensor) -> dict[str, Tensor]:
        out = _terms(operator, distribution(loc, P, d), x)
        if not operator.gradients:
            del out["loss"]
        return out

    return function


# --- Samples ----------------------------------------------------------------------------------------------------


def _sample(operator: Operator, peer: str) -> Function:
    distribution = _distribution(peer)

    def function(grad_y: Tensor, loc: Tensor, P: Tensor, d: Tensor) -> dict[str, Tensor]:
        y = distribution(loc, P, d).rsample()
        return {"y": y, "loss": (y * grad_y).sum()}

    return function


# --- Conditionals -----------------------------------------------------------------------------------------------


def textbook_condition(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, observed: Tensor) -> dict[str, Tensor]:
    """Equations 6 and 7 of the paper by Woodbury's identity, and the factor of the conditional covariance.

    Neither torch's class nor the other libraries have conditionals; this is what a user would write.
    """
    precision = observed / d
    R = P.shape[-1]
    weighted = P * precision.unsqueeze(-1)
    L = torch.linalg.cholesky(weighted.mT @ P + torch.eye(R, dtype=P.dtype, device=P.device))
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


# --- Head and likelihood ----------------------------------------------------------------------------------------


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
        R, C, _ = weight.shape
        if peer == "ours":
            mean = _public("LinearMean")(features, mean_weight, mean_bias)
            return _terms(operator, distribution(mean, _public("LinearFactor")(features, weight, bias), d), x)
        loc = F.conv2d(features, mean_weight[..., None, None], mean_bias).flatten(1)
        P = F.conv2d(features, weight.flatten(0, 1)[..., None, None], bias.flatten())
        P = P.unflatten(1, (R, C)).flatten(2).mT  # the view of [B, R, N] that a user has, not copied
        return _terms(operator, distribution(loc, P, d), x)

    return function


_FUNCTIONS: dict[str, Callable[[Operator, str], Function]] = {
    "log_prob": _density,
    "entropy": _density,
    "log_prob_backward": _density,
    "entropy_backward": _density,
    "log_prob_entropy_backward": _density,
    "rsample_backward": _sample,
    "condition": _condition,
    "linear_backward": _linear,
}


# --- Training steps ---------------------------------------------------------------------------------------------


class _Training(Job):
    """One optimiser step of `sosvae.trainer`: SOS-VAE's, β-VAE's, or SOS-VAE's with torch's class in the head."""

    def __init__(self, operator: Operator, case: Case, inputs: Arrays, device: str, peer: str) -> None:
        from sosvae import config as settings
        from sosvae import trainer
        from sosvae.objective import limits

        values = settings.Config(
            data=settings.DataConfig(height=case.height, width=case.width, channels=3 if case.channels == 3 else 1),
            model=settings.ModelConfig(rank=case.rank, diagonal=1e-3),
            training=settings.TrainingConfig(mean_only_steps=0, batch=case.batch),
        )
        self.config = settings.beta_vae(values) if peer == "betavae" else values
        self.trainer, self.limits, self.case = trainer, limits(self.config), case
        self.state = trainer.State(self.config, torch.device(device))
        model = self.state.model
        if peer == "torch":
            model.add_module("head", _TorchHead(FEATURES, case, self.config.model.diagonal).to(device))
            self.state.optimizer = torch.optim.Adam(model.parameters(), lr=self.config.training.lr, fused=True)
        # As they start, heads give no covariance to speak of; after a while of training they do.
        generator = torch.Generator(device).manual_seed(1)
        for p in model.head.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator, device=device)
        self.x = torch.from_numpy(inputs["x"]).to(device)

    def call(self) -> Any:
        terms, fault = self.trainer.train_step(self.state, self.x, self.limits, self.config)
        assert fault is None, f"the training step was not finite: {fault}"
        return terms

    def outputs(self) -> Arrays:
        self.call()
        model = self.state.model
        with torch.no_grad(), _evaluating(model):
            generator = torch.Generator(self.x.device).manual_seed(2)
            z = torch.randn(self.case.batch, self.config.model.latents, generator=generator, device=self.x.device)
            p = model.decode(z)
            log_prob, entropy = p.log_prob_and_entropy(self.x.flatten(1))
            outputs = {"log_prob": log_prob, "entropy": entropy, "loc": p.loc}
            outputs["d"] = p.cov_diag.expand_as(p.loc)
            if hasattr(p, "cov_factor"):
                outputs["P"] = p.cov_factor
        return {name: t.cpu().numpy() for name, t in outputs.items()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


class _TorchDistribution(td.LowRankMultivariateNormal):
    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(value), self.entropy()


class _TorchHead(nn.Module):
    """Two 1×1 convolutions and torch's class, as in the paper's own code."""

    def __init__(self, features: int, case: Case, diagonal: float) -> None:
        super().__init__()
        self.rank, self.diagonal = case.rank, diagonal
        self.mean = nn.Conv2d(features, case.channels, 1)
        self.factor = nn.Conv2d(features, case.rank * case.channels, 1)
        for conv, bias in ((self.mean, 0.5), (self.factor, 0.0)):
            nn.init.normal_(conv.weight, std=1e-5)
            nn.init.constant_(conv.bias, bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, mean_only: bool = False) -> _TorchDistribution:
        loc = self.mean(features).flatten(1)
        P = self.factor(features).flatten(2).unflatten(1, (self.rank, -1)).flatten(2).mT
        return _TorchDistribution(loc, P, torch.full_like(loc, self.diagonal), validate_args=False)
