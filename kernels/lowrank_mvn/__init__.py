"""Exact, fast, small multivariate normals N(μ, PPᵀ + D) over whole images.

    distributions   `LowRankMultivariateNormal`, a drop-in for torch's class of that name;
                    `LowRankMultivariateStudentT`, its heavy-tailed sibling; `StencilMultivariateNormal`, of a sparse
                    precision; `GlobalLocalNormal`, low-rank plus that
    functional      the same as functions, with `impl=` to choose the implementation
    arguments       their arguments, checked once; layout: canonical shapes
    local           the part of Σ that is not low-rank: a diagonal, or a `Stencil` of the precision
    factors         the low-rank part, a folder for each kind: `dense`, a tensor; `linear`, a linear map of features
    capacitance     R×R algebra and the rounding test, for every kind
    registry        how operators are made known to torch
    reference       the textbook formulas: the specification
    device          what kernels of all kinds share

README.md in this folder derives the formulas; ARCHITECTURE.md at the root says where something new belongs.
"""

from .distributions import (
    GlobalLocalNormal,
    LowRankMultivariateNormal,
    LowRankMultivariateStudentT,
    StencilMultivariateNormal,
)
from .distributions.patch import patch_torch
from .factors.linear.factor import LinearFactor
from .factors.linear.mean import LinearMean
from .functional import Conditional, condition, entropy, log_prob, log_prob_and_entropy, rsample
from .local.stencil.stencil import Stencil
from .registry import plain_operators

__all__ = [
    "Conditional",
    "GlobalLocalNormal",
    "LinearFactor",
    "LinearMean",
    "LowRankMultivariateNormal",
    "LowRankMultivariateStudentT",
    "Stencil",
    "StencilMultivariateNormal",
    "condition",
    "entropy",
    "log_prob",
    "log_prob_and_entropy",
    "patch_torch",
    "plain_operators",
    "rsample",
]
