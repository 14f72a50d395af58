r"""The objective, equation 3 of the paper, by the modified differential method of multipliers (Platt & Barr 1988).

Averages over the batch of nats per image:

    minimise   −log p(x|z)   subject to   KL(q(z|x) ‖ p(z)) ≤ ξ_KL   and   H(p(x|z)) ≤ ξ_H

For a constraint with violation g (KL − ξ_KL, or H − ξ_H) and multiplier λ the loss gains (λ + c·[g])·g, where
[·] takes no gradient and c is the damping; after each step λ ← max(0, λ + η·g), gradient ascent. As in the
authors' code the damping acts on both sides of the limit: it holds g near 0 rather than below it, so that a
KL under its slack does not collapse further, and the entropy is drawn up to its slack. They sum over the batch
where we average, which multiplies c and η by its size.
"""

from typing import NamedTuple

import torch
import torch.distributions as td
from torch import Tensor

from lowrank_mvn import LowRankMultivariateNormal

from .config import Config, ObjectiveConfig
from .model import VAE, PixelwiseNormal

__all__ = ["Multipliers", "Terms", "evaluate_terms", "limits", "objective", "violations"]


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
) -> tuple[Terms, LowRankMultivariateNormal | PixelwiseNormal]:
    """The terms of images `x` [B, C, H, W] (0 to 1) with one draw of z, and p(x|z) [B, N].

    Args:
        noise: standard normal, [B, latents], in place of a draw.
    """
    q = vae.encode(x)
    p = vae.decode(q.rsample() if noise is None else q.loc + q.scale * noise, mean_only)
    log_prob, entropy = p.log_prob_and_entropy(x.flatten(1))
    standard = td.Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale), validate_args=False)
    return Terms(log_prob, td.kl_divergence(q, standard).sum(-1), entropy), p


def limits(config: Config) -> dict[str, float]:
    """ξ of each constraint that is switched on, by the name of its term, in nats."""
    o, found = config.objective, {}
    if o.kl_slack is not None:
        found["kl"] = o.kl_slack
    if o.entropy_constraint and config.model.head == "structured":
        found["entropy"] = o.entropy_limit(config.pixels, config.model.rank, config.model.diagonal)
    return found


def violations(terms: Terms, limits: dict[str, float]) -> dict[str, Tensor]:
    """g of each constraint, a 0-d tensor in nats: positive where the limit is passed."""
    means = terms.mean()
    return {name: means[name] - limit for name, limit in limits.items()}


def objective(
    terms: Terms,
    g: dict[str, Tensor],
    multipliers: "Multipliers",
    config: ObjectiveConfig,
    damped: dict[str, Tensor] | None = None,
) -> Tensor:
    """The loss in nats per image, a 0-d tensor whose gradient moves the network (never the multipliers).

    Args:
        damped: [g], where `terms` and `g` are of a part of the batch: damping follows the whole of it, and the losses
            of equal parts, averaged, have the gradient of the whole one.
    """
    loss = -terms.log_prob.mean()
    if config.kl_slack is None:
        loss = loss + config.beta * terms.kl.mean()
    for name, violation in g.items():
        loss = loss + (multipliers[name] + config.damping * (damped or g)[name].detach()) * violation
    return loss


class Multipliers(dict[str, Tensor]):
    """λ ≥ 0 of each constraint, by name; all start at 0."""

    def __init__(self, names: dict[str, float], device: torch.device | str = "cpu") -> None:
        super().__init__({name: torch.zeros((), device=device) for name in names})

    @torch.no_grad()
    def ascend(self, g: dict[str, Tensor], lr: float) -> None:
        """λ ← max(0, λ + lr · g)."""
        for name, violation in g.items():
            self[name] = (self[name] + lr * violation).clamp_(min=0)
