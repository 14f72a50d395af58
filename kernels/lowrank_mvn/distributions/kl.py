"""Kullback–Leibler divergences, and N×N matrices: torch's formulas in float64, where the textbook is exact enough."""

from typing import Any

import torch
from torch.distributions import LowRankMultivariateNormal as TorchLowRank
from torch.distributions import MultivariateNormal as TorchNormal
from torch.distributions.kl import kl_divergence, register_kl

from ..factors.base import result_dtype
from ..layout import broadcast
from .normal import LowRankMultivariateNormal, double


def _kl(p: Any, q: Any) -> torch.Tensor:
    means = (d._mean if isinstance(d, LowRankMultivariateNormal) else d.loc for d in (p, q))
    dtype = torch.promote_types(*map(result_dtype, means))
    if p.event_shape == q.event_shape == (0,):  # where torch's reshape finds no size
        none: torch.Tensor = p.entropy().new_zeros(broadcast(p.batch_shape, q.batch_shape), dtype=dtype)
        return none
    return kl_divergence(_double(p), _double(q)).to(dtype)


def _double(p: Any) -> Any:
    """The same distribution as torch's class in float64."""
    if isinstance(p, LowRankMultivariateNormal):
        return double(p)
    if isinstance(p, TorchLowRank):
        factor, diag = p._unbroadcasted_cov_factor, p._unbroadcasted_cov_diag
        return TorchLowRank(p.loc.double(), factor.double(), diag.double(), validate_args=False)
    return TorchNormal(p.loc.double(), scale_tril=p._unbroadcasted_scale_tril.double(), validate_args=False)


for _other in (LowRankMultivariateNormal, TorchLowRank, TorchNormal):
    register_kl(LowRankMultivariateNormal, _other)(_kl)
    if _other is not LowRankMultivariateNormal:
        register_kl(_other, LowRankMultivariateNormal)(_kl)
