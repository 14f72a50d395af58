"""What the tests of `LinearFactor` share: sizes, inputs, and a guard against tensors of the factor's size."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal
from lowrank_mvn.factors.linear import op, op_sampling
from lowrank_mvn.registry import Operator

B, K, R, CHANNELS, HEIGHT, WIDTH = 3, 5, 16, 2, 12, 11
N, SIZES = CHANNELS * HEIGHT * WIDTH, (B, K, R, CHANNELS, (HEIGHT, WIDTH))
KERNELS = {o.name: o.kernel for m in (op, op_sampling) for o in vars(m).values() if isinstance(o, Operator)}
DTYPES = [torch.float64, torch.float32]


class NothingAsLargeAs(TorchDispatchMode):
    """Fails where an operator makes a tensor of `limit` values or more that are not a view, `but` for so many."""

    def __init__(self, limit, but=0):
        super().__init__()
        self.limit, self.but = limit, but

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if function.namespace == "lowrank_mvn":  # its kernel, as this mode sees it
            with self:
                return KERNELS[name](*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self.limit * t.element_size():
                given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
                if not any(a.untyped_storage()._cdata == t.untyped_storage()._cdata for a in given):
                    self.but -= 1
                    assert self.but >= 0, (function, t.shape)
        return out


def tensors(dtype=torch.float64, items=(), last=False, d=0.3, diagonal="pixel", samples=(), sizes=SIZES, device="cpu"):
    """Features, weight (one for each of `items`), bias, mean weight and bias, diagonal, value."""
    (B, K, R, channels, spatial), options = sizes, {"dtype": dtype, "device": device}
    N = channels * math.prod(spatial)
    F = torch.randn(B, K, *spatial, **options)
    F = F.to(memory_format=torch.channels_last) if last else F
    diag = d * (0.5 + torch.rand({"pixel": (B, N), "item": (B, 1), "scalar": ()}[diagonal], **options))
    weight, bias = torch.randn(*items, R, channels, K, **options), torch.randn(*items, R, channels, **options)
    mean = torch.randn(channels, K, **options), torch.randn(channels, **options)
    return F, weight, bias, *mean, diag, torch.randn(*samples, B, N, **options)


def distribution(F, weight, bias, mean_weight, mean_bias, d, materialise=False):
    loc, factor = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
    if materialise:
        return LowRankMultivariateNormal(loc.materialise(), factor.materialise(), d, validate_args=False)
    return LowRankMultivariateNormal(loc, factor, d, validate_args=False)


def tolerance(dtype):
    # In float32 sums of N terms of either sign: 100 roundings, relative to the result.
    return 1e-10 if dtype == torch.float64 else 100 * torch.finfo(dtype).eps
