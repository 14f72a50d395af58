"""Distributions, one file each; `kl` registers the divergences between them and torch's."""

from . import kl
from .normal import LowRankMultivariateNormal

__all__ = ["LowRankMultivariateNormal", "kl"]
