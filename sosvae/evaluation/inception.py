"""The Inception v3 that FID is defined by, in the form that its published weights have (2015-12-05).

It differs from that of textbooks: averages leave the padding out, and the last block takes a maximum in their place.
Names are those of the weights' file.
"""

import torch
from torch import Tensor, nn

__all__ = ["Inception", "resized_as_published"]


def resized_as_published(x: Tensor, side: int = 299) -> Tensor:
    """Bilinear as TensorFlow 1 did it: pixel i of the result is at i · (old size / side), with no antialiasing."""
    for axis in (-2, -1):
        size = x.shape[axis]
        place = torch.arange(side, dtype=x.dtype, device=x.device) * (size / side)
        low = place.floor().long()
        high = (low + 1).clamp_max(size - 1)
        part = (place - low).reshape(-1, 1) if axis == -2 else place - low
        a, b = x.index_select(axis, low), x.index_select(axis, high)
        x = a + (b - a) * part
    return x


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU; of stride 2 without padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn(self.conv(x)))


class Chain(nn.Module):
    """Named convolutions, of which a block puts some one after the other and joins channels of others."""

    def add(self, **convolutions: Conv) -> None:
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)

    def through(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


def _average(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(Chain):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.add(branch1x1=Conv(inputs, 64, 1), branch5x5_1=Conv(inputs, 48, 1), branch5x5_2=Conv(48, 64, 5))
        self.add(branch3x3dbl_1=Conv(inputs, 64, 1), branch3x3dbl_2=Conv(64, 96, 3), branch3x3dbl_3=Conv(96, 96, 3))
        self.add(branch_pool=Conv(inputs, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.through(x, "branch1x1"),
            self.through(x, "branch5x5_1", "branch5x5_2"),
            self.through(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            self.through(_average(x), "branch_pool"),
        ]
        return torch.cat(parts, 1)


class B(Chain):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.add(branch3x3=Conv(inputs, 384, 3, 2), branch3x3dbl_1=Conv(inputs, 64, 1))
        self.add(branch3x3dbl_2=Conv(64, 96, 3), branch3x3dbl_3=Conv(96, 96, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.through(x, "branch3x3"),
            self.through(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            nn.functional.max_pool2d(x, 3, 2),
        ]
        return torch.cat(parts, 1)


class C7(Chain):
    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        n, wide, high = inner, (1, 7), (7, 1)
        self.add(branch1x1=Conv(inputs, 192, 1), branch_pool=Conv(inputs, 192, 1))
        self.add(branch7x7_1=Conv(inputs, n, 1), branch7x7_2=Conv(n, n, wide), branch7x7_3=Conv(n, 192, high))
        self.add(branch7x7dbl_1=Conv(inputs, n, 1), branch7x7dbl_2=Conv(n, n, high), branch7x7dbl_3=Conv(n, n, wide))
        self.add(branch7x7dbl_4=Conv(n, n, high), branch7x7dbl_5=Conv(n, 192, wide))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.through(x, "branch1x1"),
            self.through(x, *(f"branch7x7_{i}" for i in range(1, 4))),
            self.through(x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
            self.through(_average(x), "branch_pool"),
        ]
        return torch.cat(parts, 1)


class D(Chain):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.add(branch3x3_1=Conv(inputs, 192, 1), branch3x3_2=Conv(192, 320, 3, 2))
        self.add(branch7x7x3_1=Conv(inputs, 192, 1), branch7x7x3_2=Conv(192, 192, (1, 7)))
        self.add(branch7x7x3_3=Conv(192, 192, (7, 1)), branch7x7x3_4=Conv(192, 192, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.through(x, "branch3x3_1", "branch3x3_2"),
            self.through(x, *(f"branch7x7x3_{i}" for i in range(1, 5))),
            nn.functional.max_pool2d(x, 3, 2),
        ]
        return torch.cat(parts, 1)


class E(Chain):
    def __init__(self, inputs: int, maximum: bool) -> None:
        super().__init__()
        self._maximum = maximum
        self.add(branch1x1=Conv(inputs, 320, 1), branch_pool=Conv(inputs, 192, 1), branch3x3_1=Conv(inputs, 384, 1))
        self.add(branch3x3_2a=Conv(384, 384, (1, 3)), branch3x3_2b=Conv(384, 384, (3, 1)))
        self.add(branch3x3dbl_1=Conv(inputs, 448, 1), branch3x3dbl_2=Conv(448, 384, 3))
        self.add(branch3x3dbl_3a=Conv(384, 384, (1, 3)), branch3x3dbl_3b=Conv(384, 384, (3, 1)))

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(x, 3, 1, 1) if self._maximum else _average(x)
        once, twice = self.through(x, "branch3x3_1"), self.through(x, "branch3x3dbl_1", "branch3x3dbl_2")
        parts = [
            self.through(x, "branch1x1"),
            *(self.through(once, f"branch3x3_2{half}") for half in "ab"),
            *(self.through(twice, f"branch3x3dbl_3{half}") for half in "ab"),
            self.through(pooled, "branch_pool"),
        ]
        return torch.cat(parts, 1)


class Inception(Chain):
    """RGB [B, 3, 299, 299] of 0 to 255 → features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.add(Conv2d_1a_3x3=Conv(3, 32, 3, 2), Conv2d_2a_3x3=Conv(32, 32, 3, pad=False))
        self.add(
            Conv2d_2b_3x3=Conv(32, 64, 3), Conv2d_3b_1x1=Conv(64, 80, 1), Conv2d_4a_3x3=Conv(80, 192, 3, pad=False)
        )
        blocks = {"5b": A(192, 32), "5c": A(256, 64), "5d": A(288, 64), "6a": B(288)}
        blocks |= {"6b": C7(768, 128), "6c": C7(768, 160), "6d": C7(768, 160), "6e": C7(768, 192)}
        blocks |= {"7a": D(768), "7b": E(1280, maximum=False), "7c": E(2048, maximum=True)}
        self._names = [f"Mixed_{name}" for name in blocks]
        for name, block in blocks.items():
            self.add_module(f"Mixed_{name}", block)

    def forward(self, x: Tensor) -> Tensor:
        x = self.through((x - 128) / 128, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
        x = self.through(nn.functional.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", "Conv2d_4a_3x3")
        x = self.through(nn.functional.max_pool2d(x, 3, 2), *self._names)
        return x.mean((2, 3))
