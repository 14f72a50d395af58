"""Exact, fast, small multivariate normals N(μ, PPᵀ + D) over whole images.

    distribution   `LowRankMultivariateNormal`, a drop-in for torch's class of that name
    functional     the same as functions, with `impl=` to choose the implementation
    linear         `LinearFactor`: a factor that is a linear map of features, and is never materialised
    reference      the textbook formulas: the specification
    aten           the closed forms in torch's operators, block by block
    triton         the closed forms as GPU kernels, imported when they are first used
    ops            the operators as torch sees them (schema, shapes, derivatives, batching); ops_rsample: samples

    aten_linear, ops_linear, ops_linear_rsample   likewise for a linear factor; linear_forms has what follows the passes

README.md in this folder derives the formulas.
"""

from .distribution import LowRankMultivariateNormal
from .functional import Conditional, condition, entropy, log_prob, log_prob_and_entropy, rsample
from .linear import LinearFactor, LinearMean

__all__ = [
    "Conditional",
    "LinearFactor",
    "LinearMean",
    "LowRankMultivariateNormal",
    "condition",
    "entropy",
    "log_prob",
    "log_prob_and_entropy",
    "rsample",
]
