"""Exact, fast, small multivariate normals N(μ, PPᵀ + D) over whole images.

    distributions   `LowRankMultivariateNormal`, a drop-in for torch's class of that name
    functional      the same as functions, with `impl=` to choose the implementation
    arguments       their arguments, checked once; layout: canonical shapes
    local           the part of Σ that is not low-rank: a diagonal
    factors         the low-rank part, a folder for each kind: `dense`, a tensor; `linear`, a linear map of features
    capacitance     R×R algebra and the rounding test, for every kind
    registry        how operators are made known to torch
    reference       the textbook formulas: the specification
    device          what kernels of all kinds share

README.md in this folder derives the formulas; ARCHITECTURE.md at the root says where something new belongs.
"""

from .distributions import kl as _kl  # noqa: F401  (registers the divergences)
from .distributions.normal import LowRankMultivariateNormal
from .distributions.patch import patch_torch
from .factors.linear.factor import LinearFactor
from .factors.linear.mean import LinearMean
from .functional import Conditional, condition, entropy, log_prob, log_prob_and_entropy, rsample

__all__ = [
    "Conditional",
    "LinearFactor",
    "LinearMean",
    "LowRankMultivariateNormal",
    "condition",
    "entropy",
    "log_prob",
    "log_prob_and_entropy",
    "patch_torch",
    "rsample",
]
