"""What is to be reached, and whether it is: float32, per-pixel d, one sample.

Of a linear factor's kernels, that they do not spill, and what they ask for with one d.
"""

from typing import NamedTuple

from . import model

# Bytes/s of P that every pipe must allow: twice what memory gives where P is [B, R, N] in memory (1.5 times for the
# capacitance, which multiplies most), and what memory gives where it is [B, N, R].
BARS = {
    "capacitance": {"BRN": 4.5e12, "BNR": 3.0e12},
    "residual": {"BRN": 6.0e12, "BNR": 3.0e12},
    "backward": {"BRN": 6.0e12, "BNR": 3.0e12},
    "sample": {"BRN": 6.0e12, "BNR": 3.0e12},
    "sample_backward": {"BRN": 6.0e12, "BNR": 3.0e12},
}
# Vectors over N that a turn loads beside its tile of P: x, μ and d, or of sampling μ (the gradient of a sample) and d.
VECTORS = {"capacitance": 3, "residual": 3, "backward": 3, "sample": 2, "sample_backward": 2}
REQUESTED = 1.05  # times the least possible


class Bar(NamedTuple):
    name: str
    reached: bool
    seen: str


def verdict(rows: list[dict], requested: dict[str, list[dict]]) -> list[Bar]:
    """One line per bar for which there are rows."""
    bars = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        failed = [f"{row['kernel']} {row['case']}: {row['error']}" for row in own if "error" in row]
        bars.append(Bar(f"compiles, {target}", not failed, "; ".join(failed) or f"{len(own)} launches"))
        spills = [f"{row['kernel']} {row['case']} {row['spills']}" for row in own if row.get("spills")]
        large = [f"{row['kernel']} {row['case']} {row['shared']}" for row in own if row.get("programs") == 0]
        bars.append(Bar(f"fits a multiprocessor, {target}", not large, "; ".join(large) or "all"))
        bars.append(Bar(f"no spills, {target}", not spills, "; ".join(spills) or "none"))
    for kernel, layouts in BARS.items():
        for layout, bar in layouts.items():
            own = [row for row in rows if _counts(row, kernel, layout)]
            capped = [(min(row["caps"].values()), row) for row in own if "caps" in row]
            if capped:
                cap, row = min(capped, key=lambda pair: pair[0])
                pipe = min(row["caps"], key=row["caps"].__getitem__)
                seen = f"{cap / 1e12:.2f} (R = {row['R']}, {pipe})"
                bars.append(Bar(f"{kernel} ≥ {bar / 1e12:.1f} TB/s, {layout}", cap >= bar, seen))
            own = [row for row in own if row["target"] == "sm_90"]
            if own:
                # Memory's rate is of all that it delivers.
                flight = min(row["bytes_in_flight"] * (1 + VECTORS[kernel] / row["R"]) for row in own)
                name = f"{kernel} in flight ≥ {model.needed_in_flight() / 1e3:.1f} kB, {layout}"
                bars.append(Bar(name, flight >= model.needed_in_flight(), f"{flight / 1e3:.1f} kB"))
            if own and layout == "BRN":
                narrow = [f"R = {row['R']}" for row in own if not _wide(row)]
                bars.append(
                    Bar(f"{kernel} moves P 16 bytes at a time, {layout}", not narrow, ", ".join(narrow) or "all")
                )
    ratios = [
        (row["requested"] / row["floor"], row["kernel"], case)
        for case, launches in requested.items()
        for row in launches
        if row["floor"]
    ]
    for kernel in dict.fromkeys(kernel for _, kernel, _ in ratios):
        own = sorted(row for row in ratios if row[1] == kernel)
        (least, _, _), (ratio, _, case) = own[0], own[-1]
        # Below 1 a kernel has left out work, such as that of an item that another kernel makes.
        reached = least >= 1 and ratio <= REQUESTED
        bars.append(
            Bar(f"{kernel} asks for ≤ {REQUESTED} × the least", reached, f"{least:.3f} to {ratio:.3f} ({case})")
        )
    return bars


def _counts(row: dict, kernel: str, layout: str) -> bool:
    plain = row["case"].endswith(" float32 pixel")
    return row["kernel"] == kernel and row.get("layout") == layout and plain and "loads" in row


def _wide(row: dict) -> bool:
    """Whether the rows of P that are read (and written) are moved 16 bytes at a time, all of them."""
    least = row["tile_in_16_bytes"]
    read = not row["reads_tile"] or row["loads"].get(16, 0) >= least
    return read and (not row["writes_tile"] or row["stores"].get(16, 0) >= least)
