r"""The objective, equation 3 of the paper, by the modified differential method of multipliers (Platt & Barr 1988).

Averages over the batch of nats per image:

    minimise   −log p(x|z)   subject to   KL(q(z|x) ‖ p(z)) ≤ ξ_KL   and   H(p(x|z)) ≤ ξ_H

For a constraint with violation g (KL − ξ_KL, or H − ξ_H) and multiplier λ the loss gains (λ + c·[g])·g, where
[·] takes no gradient and c is the damping; after each step λ ← max(0, λ + η·g), gradient ascent. The damping acts
on both sides of the limit, as in the authors' code: it holds g near 0 rather than below it, so that a KL under its
slack does not collapse further, and the entropy is drawn up to its slack. They sum over the batch,
which multiplies their c and η by its size; we average.

A mean that is held keeps ‖x − μ‖² at the level that the mean-only steps reached. With ē its running average, the
loss gains (λ + c·[v]₊)·½N·‖x − μ‖²/level, v = ē/level − 1.05: the second factor is what the residual costs under
independent pixels of the variance reached, so that λ = 1 weighs the mean as a β-VAE of one variance would. The network
has met that level, so λ stays small; it is at most 10 in any case.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributions as td
from torch import Tensor

from .config import Config, ObjectiveConfig
from .models import heads
from .models.observation import Observation
from .models.vae import VAE

__all__ = ["Constraints", "Terms", "evaluate_terms", "objective"]


# Of a mean that is held: steps that ē remembers, room above the level, and of λ the step and the most.
MEMORY, SLACK, MEAN_LR, MOST = 50, 0.05, 0.1, 10.0
TINY = 1e-12


class Terms(NamedTuple):
    """What the objective is made of, each [B], in nats per image."""

    log_prob: Tensor  # log p(x|z), z ~ q(z|x), one sample
    kl: Tensor  # KL(q(z|x) ‖ p(z)), p(z) = N(0, I)
    entropy: Tensor  # H(p(x|z))

    def mean(self) -> dict[str, Tensor]:
        """Averages over the batch, by name."""
        return {name: term.mean() for name, term in self._asdict().items()}


def evaluate_terms(
    vae: VAE, x: Tensor, mean_only: bool = False, noise: Tensor | None = None
) -> tuple[Terms, Observation]:
    """The terms of images `x` [B, channels, H, W] (0 to 1) with one draw of z, and p(x|z) [B, N].

    Args:
        noise: standard normal, [B, latents], in place of a draw.
    """
    q = vae.encode(x)
    p = vae.decode(q.rsample() if noise is None else q.loc + q.scale * noise, mean_only)
    log_prob, entropy = p.log_prob_and_entropy(x.flatten(1))
    standard = td.Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale), validate_args=False)
    return Terms(log_prob, td.kl_divergence(q, standard).sum(-1), entropy), p


class Constraints:
    """Limits on terms, and the multipliers that hold them.

    Attributes:
        limits: ξ of each constraint, by the name of its term, in nats.
        multipliers: λ ≥ 0 of each, 0-d tensors; all start at 0.

    Args:
        damping: c, in 1/nat.
        lr: η, the step of the multipliers, in 1/nat.
        holds_mean: ‖x − μ‖² is held; its λ, level and running average are among the multipliers.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        damping: float = 0.0,
        lr: float = 0.0,
        device: torch.device | str = "cpu",
        holds_mean: bool = False,
    ) -> None:
        self.limits, self.damping, self.lr, self.holds_mean = dict(limits), damping, lr, holds_mean
        self.paused: frozenset[str] = frozenset()  # terms that nothing moves at the moment
        self.error = torch.zeros((), device=device)  # ‖x − μ‖² of the last batch, where the mean is held
        names = [*limits, *(("mean", "mean_level", "mean_error") if holds_mean else ())]
        self.multipliers = {name: torch.zeros((), device=device) for name in names}

    @classmethod
    def of(cls, config: Config, device: torch.device | str = "cpu") -> "Constraints":
        """Those that a configuration switches on: on the KL, and what its head constrains."""
        o = config.objective
        limits = ({} if o.kl_slack is None else {"kl": o.kl_slack}) | heads.find(config.model.head).limits(config)
        return cls(limits, o.damping, o.multiplier_lr, device, o.mean == "held")

    def violations(self, terms: Terms) -> dict[str, Tensor]:
        """g of each, a 0-d tensor in nats: positive where the limit is passed."""
        means = terms.mean()
        return {name: means[name] - limit for name, limit in self.limits.items() if name not in self.paused}

    def penalised(self, loss: Tensor, terms: Terms, damped: Mapping[str, Tensor] | None = None) -> Tensor:
        """loss + Σ (λ + c·[g])·g, whose gradient moves the network, never the multipliers.

        Args:
            damped: [g], where `terms` are of a part of the batch; by default their own.
        """
        violations = self.violations(terms)
        for name, g in violations.items():
            loss = loss + (self.multipliers[name] + self.damping * (damped or violations)[name].detach()) * g
        return loss

    @torch.no_grad()
    def ascend(self, terms: Terms) -> None:
        """λ ← max(0, λ + η·g)."""
        for name, g in self.violations(terms).items():
            self.multipliers[name] = (self.multipliers[name] + self.lr * g).clamp_(min=0)

    def held(self, loss: Tensor, error: Tensor, values: int) -> Tensor:
        """loss + (λ + c·[v]₊)·½N·error/level once there is a level.

        Args:
            error: ‖x − μ‖², a 0-d tensor, the mean of the batch or of a part of it.
            values: N.
        """
        m = self.multipliers
        level = m["mean_level"]
        weight = m["mean"] + self.damping * self._excess().clamp(min=0)
        return loss + torch.where(level > 0, weight * 0.5 * values / level.clamp_min(TINY), 0.0) * error

    @torch.no_grad()
    def notice(self, error: Tensor, mean_only: bool) -> None:
        """After a step in which ‖x − μ‖² was `error`: ē moves; of mean-only steps the level too, of others λ."""
        m = self.multipliers
        m["mean_error"] = torch.where(m["mean_error"] > 0, m["mean_error"].lerp(error, 1 / MEMORY), error)
        if mean_only:
            m["mean_level"] = m["mean_error"].clone()
        else:
            m["mean"] = (m["mean"] + MEAN_LR * self._excess()).clamp_(0, MOST)

    def _excess(self) -> Tensor:
        """v."""
        return self.multipliers["mean_error"] / self.multipliers["mean_level"].clamp_min(TINY) - 1 - SLACK

    def load(self, multipliers: Mapping[str, Tensor]) -> None:
        """Goes on with multipliers that were saved."""
        for name, value in multipliers.items():
            self.multipliers[name] = value.to(self.multipliers[name].device)


def objective(
    terms: Terms, constraints: Constraints, config: ObjectiveConfig, damped: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The loss in nats per image, a 0-d tensor.

    Args:
        config: weighs the KL with `beta` where it is not constrained.
        damped: [g] of the whole batch, where `terms` are of a part of it: the losses of equal parts, averaged, then
            have the gradient of the whole one.
    """
    loss = -terms.log_prob.mean()
    if config.kl_slack is None:
        loss = loss + config.beta * terms.kl.mean()
    return constraints.penalised(loss, terms, damped)
