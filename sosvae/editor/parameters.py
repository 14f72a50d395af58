"""What the decoder said for one code, as the page reads it: typed arrays behind a JSON header.

    "SOSP" | uint32 length of the header | header, padded with spaces | arrays, each at a multiple of 8 bytes

Little-endian. The header has `shape` (channels, H, W), `head`, `where`, `arrays` (name, dtype, shape, offset from the
end of the header) and, where float16 was asked for, `error`. Arrays:

- `loc` [N], the mean μ;
- `factor` [R, N], B = PV with PᵀP = V diag(s²) Vᵀ, largest component first; absent for independent pixels;
- `scale` [R], float16 only: row k of `factor` has to be multiplied with it (a power of two, so that a small component
  does not become subnormal);
- `d` [N] or [1], always float32: 1e-5 is subnormal in float16; or, where the local part is a sparse precision TTᵀ,
- `t` [stencils, pixels], `s` [stencils, neighbours, pixels] and, where channels are tied, `ties` [pairs, pixels or 1],
  with the neighbours' `offsets` (row, column) in the header; see `lowrank_mvn.Stencil`. Of these `s`, relative weights,
  may be float16;
- `original` [channels, H, W] of bytes, the image that the code comes from, if there is one.

Student's t has its degrees of freedom, `df`, in the header; factor and d are those of its scale matrix.

A distribution that the page has no formulas for is sent as its mean with `where` = "server": the page says so, and asks
the server for conditionals.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank_mvn import (
    GlobalLocalNormal,
    LowRankMultivariateNormal,
    LowRankMultivariateStudentT,
    Stencil,
    StencilMultivariateNormal,
)
from lowrank_mvn.local.stencil.grid import offsets

from ..models.observation import Observation, PixelwiseNormal

__all__ = ["MAGIC", "Prediction", "container", "pack", "predict", "unpack"]

MAGIC = b"SOSP"
PRECISIONS = ("float32", "float16")


class Prediction(NamedTuple):
    """One p(x|z) in its principal basis, float32 on the CPU."""

    loc: NDArray[np.float32]  # [N]
    factor: NDArray[np.float32] | None = None  # [R, N]
    d: NDArray[np.float32] | None = None  # [N] or [1]
    stencil: Mapping[str, NDArray[np.float32]] | None = None  # t, s and ties
    offsets: tuple[tuple[int, ...], ...] = ()
    df: float | None = None  # degrees of freedom of Student's t; factor and d are then of its scale matrix

    @property
    def where(self) -> str:
        """ "server" where the page has no formulas."""
        return "server" if self.d is None and self.stencil is None else "page"


@torch.no_grad()
def predict(p: Observation) -> Prediction:
    """The first distribution of a batch, in its principal basis.

    Args:
        p: p(x|z) with batch shape [B].
    """
    loc = _float32(p.loc[0])
    if isinstance(p, PixelwiseNormal):
        return Prediction(loc, None, _one_d(p.cov_diag[0]))
    if isinstance(p, LowRankMultivariateNormal):
        return Prediction(loc, _principal(p.cov_factor[0]), _one_d(p.cov_diag[0]))
    if isinstance(p, LowRankMultivariateStudentT):
        return Prediction(loc, _principal(p.cov_factor[0]), _one_d(p.cov_diag[0]), df=float(p.df[0]))
    if isinstance(p, GlobalLocalNormal | StencilMultivariateNormal) and isinstance(p.stencil, Stencil):
        factor = _principal(p.cov_factor[0]) if isinstance(p, GlobalLocalNormal) else None
        return Prediction(loc, factor, None, _weights(p.stencil), offsets(p.stencil.neighbourhood))
    return Prediction(loc)


def _principal(P: torch.Tensor) -> NDArray[np.float32]:
    """B = PV, transposed."""
    P = P.double()
    V = torch.linalg.eigh(P.mT @ P).eigenvectors.flip(-1)  # eigenvalues ascend
    V = V * torch.where(V.sum(0) < 0, -1.0, 1.0)  # a column's sign is free: fixed, so that pictures are reproducible
    return _float32((P @ V).mT)


def _weights(stencil: Stencil) -> dict[str, NDArray[np.float32]]:
    """Of the first item."""
    t, s, ties = stencil.log_diagonal.exp(), stencil.neighbours, stencil.ties
    weights = {"t": t.reshape(-1, *t.shape[-3:])[0].flatten(1), "s": s.reshape(-1, *s.shape[-4:])[0].flatten(2)}
    if ties is not None:
        weights["ties"] = ties.reshape(-1, *ties.shape[-3:])[0].flatten(1)
    return {name: _float32(value) for name, value in weights.items()}


def pack(
    prediction: Prediction,
    shape: tuple[int, int, int],
    precision: str = "float32",
    original: NDArray[np.uint8] | None = None,
    **header: Any,
) -> bytes:
    """The container's bytes.

    Args:
        shape: (channels, H, W).
        precision: of mean and factor, "float32" or "float16".
        original: the image behind the code, bytes [channels, H, W].
        header: further entries of the header, plain JSON.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    arrays: dict[str, NDArray[Any]] = {"loc": prediction.loc}
    if prediction.factor is not None:
        arrays["factor"] = prediction.factor
    if prediction.d is not None:
        arrays["d"] = prediction.d
    if prediction.stencil is not None:
        arrays |= prediction.stencil
        header["offsets"] = [list(offset) for offset in prediction.offsets]
    if prediction.df is not None and np.isfinite(prediction.df):
        header["df"] = prediction.df
    if precision == "float16":
        arrays, header["error"] = _halved(arrays)
        if prediction.stencil is not None:
            arrays["s"] = arrays["s"].astype(np.float16)
            header["error"]["local"] = _off(prediction, arrays["s"].astype(np.float32), shape)
    if original is not None:
        arrays["original"] = original
    return container(arrays, {"version": 1, "shape": list(shape), "where": prediction.where, **header})


def unpack(raw: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The header and the arrays, float16 as it is.

    Raises:
        ValueError: these are other bytes.
    """
    if raw[:4] != MAGIC:
        raise ValueError("these are no parameters of sosvae edit")
    (length,) = struct.unpack_from("<I", raw, 4)
    header = json.loads(raw[8 : 8 + length])
    arrays = {}
    for entry in header["arrays"]:
        count = int(np.prod(entry["shape"]))
        flat = np.frombuffer(raw, entry["dtype"], count, 8 + length + entry["offset"])
        arrays[entry["name"]] = flat.reshape(entry["shape"])
    return header, arrays


def _halved(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Mean and factor in float16, and the largest error of each (intensity; white is 1)."""
    halved = dict(arrays)
    halved["loc"] = arrays["loc"].astype(np.float16)
    error = {"loc": float(np.abs(halved["loc"].astype(np.float32) - arrays["loc"]).max())}
    if "factor" in arrays:
        factor = arrays["factor"]
        scale = np.exp2(np.ceil(np.log2(np.maximum(np.abs(factor).max(1), 1e-30)))).astype(np.float32)
        halved["factor"] = (factor / scale[:, None]).astype(np.float16)
        halved["scale"] = scale
        restored = halved["factor"].astype(np.float32) * scale[:, None]
        # One standard deviation along every component at once, in the worst pixel.
        error["factor"] = float(np.sqrt(np.square(restored - factor).sum(0)).max())
    return halved, error


def _off(prediction: Prediction, s: NDArray[np.float32], shape: tuple[int, int, int]) -> float:
    """How far other weights `s` take one sample of the local part, in the worst pixel (intensity)."""
    channels, *size = shape
    side = 1 + 2 * max(abs(part) for offset in prediction.offsets for part in offset)
    arrays = {name: torch.tensor(array) for name, array in (prediction.stencil or {}).items()}
    ties = arrays.get("ties")
    if ties is not None:
        ties = ties.unflatten(-1, size if ties.shape[-1] > 1 else (1, 1))

    def sample(weights: torch.Tensor) -> torch.Tensor:
        t = arrays["t"].log().unflatten(-1, size)
        stencil = Stencil(t, weights.unflatten(-1, size), ties, (side, side), channels)
        omega = torch.randn(channels * size[0] * size[1], generator=torch.Generator().manual_seed(0))
        return stencil.colour(omega, "aten")

    return float((sample(arrays["s"]) - sample(torch.tensor(s))).abs().max())


def container(arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> bytes:
    """Arrays by name behind a JSON header, to which `arrays` is added."""
    entries, chunks, offset = [], [], 0
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        raw += b"\0" * (-len(raw) % 8)
        entries.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": offset})
        chunks.append(raw)
        offset += len(raw)
    text = json.dumps({**header, "arrays": entries}).encode()
    text += b" " * (-len(text) % 8)
    return MAGIC + struct.pack("<I", len(text)) + text + b"".join(chunks)


def _one_d(d: torch.Tensor) -> NDArray[np.float32]:
    """[1] where all pixels have the same variance."""
    return _float32(d[:1] if bool((d == d[0]).all()) else d)


def _float32(values: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
