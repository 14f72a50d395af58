"""The launches of a step, captured with their arguments, as dispatch chooses them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from lowrank_mvn.device import launch as launches
from lowrank_mvn.factors.dense import triton as dense
from lowrank_mvn.factors.linear import triton as linear
from lowrank_mvn.local.stencil import triton as stencil

# Bytes of shared memory that one program may have (CUDA programming guide, table of technical specifications; CDNA3).
SHARED = {
    "sm_75": 65536,
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _named(sizes: str, case: "Case | LinearCase", gradients: str, *differences: str) -> str:
    """What a table calls a case: its sizes, layout, dtype and diagonal, then what is not as usual.

    `gradients` has a letter for each of `needs`.
    """
    usual = type(case)._field_defaults
    words = [sizes, case.layout, _short(case.dtype), case.diagonal]
    words += [f"{name}={getattr(case, name)}" for name in differences if getattr(case, name) != usual[name]]
    if case.others not in (None, case.dtype):
        words.append(f"others={_short(case.others)}")
    if not all(case.needs):
        words.append("grads=" + "".join(itertools.compress(gradients, case.needs)))
    return " ".join(words)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    """One problem: sizes, the layout of P in memory ("BRN" is a convolution's output), and dtypes."""

    R: int
    layout: str = "BRN"
    dtype: torch.dtype = torch.float32
    diagonal: str = "pixel"
    B: int = 8
    N: int = 12292  # as 116 412, a multiple of 4 and not of 16, which Triton would see by itself
    S: int = 1
    means: bool = False  # a mean for each sample
    given: bool = False  # the noise of the sample
    gram: bool = False  # what conditioning asks for, beside the step
    others: torch.dtype | None = None  # of x, μ and d, if not that of P
    needs: tuple[bool, ...] = (True,) * 4  # gradients of x, μ, P and d

    @property
    def name(self) -> str:
        return _named(f"R={self.R}", self, "xμPd", "S", "N", "means", "given")

    @property
    def rows(self) -> int:
        """Of what the main loops walk over."""
        return self.R

    def step(self, make: Callable[..., torch.Tensor]) -> None:
        """Log-density, entropy and a sample with every gradient; where there are no samples, the entropy alone."""
        S, B, N, R = self.S, self.B, self.N, self.R
        others = self.others or self.dtype
        P = make(B, R, N).to(self.dtype).mT if self.layout == "BRN" else make(B, N, R).to(self.dtype)
        d = (make(B, N if self.diagonal == "pixel" else 1).abs() + 0.5).to(others)
        x, loc = make(S, B, N).to(others), make(S if self.means else 1, B, N).to(others)
        if not self.S:
            logdet, *kept = dense.logdet(P, d)
            dense.logdet_backward(logdet, P, d, *kept, [*self.needs[2:]])
            return
        q, logdet, *rest = dense.mahalanobis_and_logdet(x, loc, P, d)
        dense.mahalanobis_and_logdet_backward(q, logdet, x, loc, P, d, *rest, [*self.needs])
        seed = None if self.given else torch.zeros(self.B, dtype=torch.int64)
        omega_p = make(self.S, self.B, self.R).to(loc.dtype)
        omega_d = make(self.S, self.B, self.N).to(loc.dtype) if self.given else None
        y = dense.rsample(loc, P, d, omega_p, omega_d, seed)
        _, _, need_P, need_d = self.needs
        dense.rsample_backward(y, P, d, omega_p, omega_d, seed, [need_P, need_d, self.given])
        if self.gram:
            dense.normal_equations(x, loc, P, d)


class LinearCase(NamedTuple):
    """One problem with a linear factor; the layout of F is channels first ("BKM") or last ("BMK")."""

    K: int
    layout: str = "BKM"
    dtype: torch.dtype = torch.float32
    diagonal: str = "item"
    R: int = 25
    channels: int = 3
    B: int = 8
    pixels: int = 12292
    S: int = 1
    loc: bool = False  # a mean as a tensor; with it given noise, and what conditioning asks for
    others: torch.dtype | None = None  # of everything but F
    needs: tuple[bool, ...] = (True,) * 3  # gradients of x (and a mean), F and d

    @property
    def name(self) -> str:
        return _named(f"K={self.K}", self, "xFd", "S", "channels", "R", "pixels") + (" loc" if self.loc else "")

    @property
    def rows(self) -> int:
        return self.K

    def step(self, make: Callable[..., torch.Tensor]) -> None:
        """Log-density and entropy with gradients, and a sample; of a mean that is a tensor, conditioning too; without
        samples the entropy alone."""
        (K, R, B, S), others = (self.K, self.R, self.B, self.S), self.others or self.dtype
        channels, pixels = self.channels, self.pixels
        F = make(B, K, pixels).to(self.dtype) if self.layout == "BKM" else make(B, pixels, K).to(self.dtype).mT
        W, m = make(1, channels, R, K + 1).to(others), None if self.loc else make(channels, K + 1).to(others)
        d = ((make(B, channels, pixels) if self.diagonal == "pixel" else make(B, 1, 1)).abs() + 0.5).to(others)
        if not S:
            logdet, *kept = linear.logdet(F, W, d)
            linear.logdet_backward(logdet, F, W, d, *kept, [*self.needs[1:]])
            return
        x, loc = make(S, B, channels, pixels).to(others), make(1, B, channels, pixels).to(others) if self.loc else None
        problem = x, loc, F, W, m, d
        q, logdet, *kept = linear.mahalanobis_and_logdet(*problem)
        linear.mahalanobis_and_logdet_backward(q, logdet, *problem, *kept, [*self.needs])
        seed, noise = (None, torch.empty_like(x)) if self.loc else (torch.zeros(B, dtype=torch.int64), None)
        u = make(B, S, channels, K + 1).to(torch.promote_types(others, torch.float32))  # as its operator gives it
        linear.rsample(loc, F, u, d, noise, seed)
        if self.loc:
            linear.normal_equations(*problem)


class StencilCase(NamedTuple):
    """One problem with a stencil for each channel, or, without ties of several channels, one for all."""

    neighbourhood: tuple[int, ...] = (3, 3)
    spatial: tuple[int, ...] = (64, 64)
    dtype: torch.dtype = torch.float32
    channels: int = 1
    ties: bool = False
    B: int = 8
    S: int = 1
    layout: str = "image"
    diagonal: str = "pixel"

    @property
    def name(self) -> str:
        window, sizes = ("×".join(map(str, numbers)) for numbers in (self.neighbourhood, self.spatial))
        words = [f"{window} on {sizes}×{self.channels}", _short(self.dtype), *(["ties"] if self.ties else [])]
        return " ".join([*words, *([f"S={self.S}"] if self.S > 1 else [])])

    @property
    def rows(self) -> int:
        """Weights of a pixel."""
        return 1 + math.prod(self.neighbourhood) // 2

    @property
    def R(self) -> int:
        return self.rows

    def step(self, make: Callable[..., torch.Tensor]) -> None:
        """Log-density with every gradient, products with T, and solves with both triangles."""
        pixels, stencils = math.prod(self.spatial), self.channels if self.ties else 1
        x, loc = make(self.S, self.B, self.channels, pixels), make(1, self.B, self.channels, pixels)
        weights = make(self.B, stencils, pixels), make(self.B, stencils, self.rows - 1, pixels)
        ties = make(self.B, self.channels * (self.channels - 1) // 2, pixels).to(self.dtype) if self.ties else None
        x, loc, log_diagonal, neighbours = (t.to(self.dtype) for t in (x, loc, *weights))
        given = log_diagonal, neighbours, ties
        where = self.spatial, self.neighbourhood
        y, q, logdet = stencil.product(x, loc, *given, *where)
        needs = [False, True, True, True, self.ties]
        stencil.product_backward(x, loc, *given, y, None, q, logdet, *where, needs)
        stencil.product_backward(x, None, *given, y, y, None, None, *where, [True, False, *needs[2:]])
        stencil.transpose(x, *given, *where)
        for transposed in (False, True):
            stencil.solve(x, *given, *where, transposed)


AnyCase = Case | LinearCase | StencilCase


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        name = self.kernel.fn.__name__.removesuffix("_kernel")
        return f"{name} (float64)" if self.wide else name

    @property
    def wide(self) -> bool:
        """Whether it is for the items that float32 is not good enough for."""
        return self.arguments.get("KIND") in ("float64", "outer")

    @property
    def sizes(self) -> str | None:
        """Of a product, whose rows are otherwise alike: those of its operands."""
        if "ONES" not in self.arguments:
            return None
        return "×".join(map(str, self.arguments["sizes"]))

    @property
    def configuration(self) -> tuple:
        """What the compiler sees of the launch."""
        constants = {p.name for p in self.kernel.params if p.is_constexpr}

        def seen(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.dtype
            if isinstance(value, tuple) and name not in constants:
                return tuple(seen(name, v) for v in value)
            if name in constants or not isinstance(value, int):
                return value, type(value)
            return value == 1, value % 16 == 0, abs(value) < 2**31  # of other numbers it is told no more

        arguments = tuple((name, seen(name, value)) for name, value in self.arguments.items())
        return self.kernel.fn.__name__, self.num_warps, self.num_stages, arguments

    @property
    def tile(self) -> torch.Tensor | None:
        """P, its gradient, or F, if the main loop walks over it: the kernels whose bandwidth counts."""
        names = ("P_at", "grad_P_at", "F_at", "X_at")
        found = next((self.arguments[name] for name in names if self.arguments.get(name) is not None), None)
        return None if found is None else found[0]

    @property
    def tile_size(self) -> tuple[int, int]:
        """Rows and columns of one tile, padded; of a product, what is summed is a row."""
        tile = self.arguments["TILE"]
        rows = tile.SUMMED if "ONES" in self.arguments else tile.ROWS * getattr(tile, "PIECES", 1)
        return rows, tile.COLUMNS


def captured(case: AnyCase, target: str) -> list[Launch]:
    """What a step launches on a device of `target`, each configuration once; of a linear factor, its own dense."""
    seen: dict[tuple, Launch] = {}

    def launch(kernel, grid, num_warps, num_stages=1, **arguments):
        found = Launch(kernel, grid, num_warps, num_stages, arguments)
        if not isinstance(case, LinearCase) or found.name.startswith(("linear", "product")):
            seen.setdefault(found.configuration, found)

    name = "gfx" if target.startswith("gfx") else "sm_80" if target == "sm_86" else target
    with (
        patch.object(launches, "target", lambda device: name),
        patch.object(launches, "shared_memory", lambda device: SHARED[target]),
        patch.object(launches, "launch", launch),
    ):
        case.step(torch.empty)
    return list(seen.values())


def distinct(tasks: Iterable[tuple[AnyCase, str]]) -> Iterator[tuple[AnyCase, str, list[int]]]:
    """The tasks, with the positions of those of their launches that no earlier task of the same target had."""
    seen: dict[str, set[tuple]] = {}
    for case, target in tasks:
        known, new = seen.setdefault(target, set()), []
        for i, launch in enumerate(captured(case, target)):
            if launch.configuration not in known:
                known.add(launch.configuration)
                new.append(i)
        if new:
            yield case, target, new


def all_cases(ranks: list[int], layouts: list[str]) -> Iterator[Case]:
    """Dtypes, diagonals, one sample or two with given noise and conditioning; and, one at a time, what changes a launch
    beside these: a size that allows only loads of one value, or 16, an entropy alone, samples of drawn noise, so many
    that programs share them, a mean for each, gradients of μ and P alone, and float32 beside bfloat16."""
    for R, layout in itertools.product(ranks, layouts):
        for dtype, diagonal in itertools.product(DTYPES, ("pixel", "item")):
            yield Case(R, layout, dtype, diagonal)
            yield Case(R, layout, dtype, diagonal, S=2, given=True, gram=True)
        plain = Case(R, layout)
        for N in (12288, 12293):
            yield plain._replace(N=N)
        for S in (0, 2, 4096):
            yield plain._replace(S=S, B=1)
        yield plain._replace(S=2, means=True)
        for diagonal in ("pixel", "item"):
            yield plain._replace(diagonal=diagonal, needs=(False, True, True, False))
            yield plain._replace(diagonal=diagonal, dtype=torch.bfloat16, others=torch.float32)


def all_linear_cases(features: list[int], layouts: list[str]) -> Iterator[LinearCase]:
    """Likewise for these numbers of features: one channel or three, of three two samples; a linear mean, or a tensor.

    More features than a tile holds go by blocks of P if the rank is small, and are walked over if it is large.
    """
    for K, layout in itertools.product(features, layouts):
        for R, diagonal in itertools.product((25, 100) if K > 128 else (25,), ("item", "pixel")):
            for dtype in DTYPES:
                for channels, S in ((3, 1), (1, 1), (3, 2)):
                    yield LinearCase(K, layout, dtype, diagonal, R, channels, S=S)
                yield LinearCase(K, layout, dtype, diagonal, R, loc=True)
            plain = LinearCase(K, layout, diagonal=diagonal, R=R)
            yield plain._replace(S=0)
            for pixels in (12288, 12293):
                yield plain._replace(pixels=pixels)
            for dtype in (torch.float32, torch.bfloat16):  # what a step of training asks for, in either precision
                yield plain._replace(dtype=dtype, others=torch.float32, needs=(False, True, False))


def stencil_cases(everything: bool) -> Iterator[StencilCase]:
    """Neighbourhoods, channels and volumes in float32, half precision and several samples; or each in every dtype."""
    plain = [StencilCase(), StencilCase((5, 5)), StencilCase((3, 3), (218, 178), channels=3, ties=True)]
    plain += [StencilCase((3, 3), channels=3), StencilCase((3, 3, 3), (32, 32, 32))]
    if not everything:
        yield from [*plain, StencilCase(dtype=torch.bfloat16), StencilCase(S=64)]
    for case, dtype, S in itertools.product(plain if everything else [], DTYPES, (1, 2, 64)):
        yield case._replace(dtype=dtype, S=S)
