"""Distributions, one file each; `kl` registers the divergences between them and torch's."""

from . import kl
from .global_local import GlobalLocalNormal
from .normal import LowRankMultivariateNormal
from .stencil import StencilMultivariateNormal

__all__ = ["GlobalLocalNormal", "LowRankMultivariateNormal", "StencilMultivariateNormal", "kl"]
