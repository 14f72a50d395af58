"""Exact, fast, small multivariate normals N(μ, PPᵀ + D) over whole images.

    p = LowRankMultivariateNormal(loc, cov_factor, cov_diag)  # torch's class of that name, with its arguments
    log_prob, entropy = p.log_prob_and_entropy(images)

`LowRankMultivariateStudentT` has heavy tails, `StencilMultivariateNormal` a sparse precision, `GlobalLocalNormal` a
low-rank part over one. A `LinearFactor` takes the place of a factor that is a 1×1 convolution of features. The
functions do the same without a class; `impl=` chooses the implementation. README.md beside this derives the formulas.
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

__version__ = "0.1.0"

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
