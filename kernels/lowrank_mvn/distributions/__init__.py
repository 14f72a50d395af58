"""Distributions, one file each; `kl` registers the divergences between them and torch's."""

from . import kl
from .global_local import GlobalLocalNormal
from .normal import LowRankMultivariateNormal
from .stencil import StencilMultivariateNormal
from .student_t import LowRankMultivariateStudentT

__all__ = [
    "GlobalLocalNormal",
    "LowRankMultivariateNormal",
    "LowRankMultivariateStudentT",
    "StencilMultivariateNormal",
    "kl",
]
