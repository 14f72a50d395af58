"""Which images are held out: the rules, and the record of it that a run keeps.

There are three parts: images to train on, images for every choice (`validation`), and images that are looked at once,
to report (`test`). Runs of earlier versions kept the first two.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..files import write_atomically
from .decode import shown

__all__ = [
    "PARTS",
    "TEST",
    "ChangedDataError",
    "Rule",
    "Split",
    "compare",
    "divide",
    "listing",
    "merged",
    "with_test",
]

PARTS = ("train", "validation")  # which every data set has
TEST = "test"

Rule = Literal["hashed", "drawn", "published"]
"""`hashed`: a group's own hash decides, so that other groups may come and go. `drawn`: a permutation of all groups, for
collections that are complete, and for runs that were started before splits were kept. `published`: the source says."""


class ChangedDataError(ValueError):
    """The images are not those of the split that was given; `changes` says how they differ, a line each."""

    def __init__(self, source: str, changes: list[str]) -> None:
        found = "; ".join(changes)
        super().__init__(
            f"{shown(source)} is not the data that this was trained on: {found}; --accept-data-changes goes on with it"
        )
        self.changes = changes


@dataclass(frozen=True)
class Split:
    """Which image is in which part. It holds no path: the same images elsewhere are the same data.

    Attributes:
        rule: what the parts follow from.
        decoding: version of the decoding; another one gives other pixels from the same files.
        parts: part → name of the image → digest of its file's content (16 hexadecimal digits).
    """

    rule: Rule
    decoding: int
    parts: Mapping[str, Mapping[str, str]]

    @property
    def digest(self) -> str:
        """SHA-256 of names, contents and parts."""
        return hashlib.sha256(json.dumps([self.decoding, self.parts], sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Writes JSON. It is ASCII, because a file's name need not be UTF-8."""
        values = {"rule": self.rule, "decoding": self.decoding, "digest": self.digest, "parts": self.parts}
        write_atomically(path, json.dumps(values, indent=0).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> "Split":
        """What `write` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is damaged, or something else.
        """
        try:
            values = json.loads(path.read_bytes())
            split = cls(values["rule"], values["decoding"], values["parts"])
            whole = split.rule in get_args(Rule) and split.digest == values["digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not the record of a split: {type(error).__name__} ({error})") from None
        if not whole:
            raise ValueError(f"{path} is damaged: its digest is not that of its content")
        return split


def divide(groups: Sequence[str], rule: Rule, fraction: float) -> list[str]:
    """The part of each image, whole groups together, about `fraction` of the groups for validation.

    There is a group in each part where there are two at all; a single one is validation.
    """
    people = sorted(set(groups))
    if rule == "drawn":
        count = max(1, round(fraction * len(people)))
        held_out = set(np.random.default_rng(0).permutation(np.array(people, dtype=object))[:count])
    else:
        # The lowest places are validation. A further part will take the highest ones and move none between these two.
        people.sort(key=_place)
        count = max(1, sum(_place(person) < fraction for person in people))
        held_out = set(people[: max(1, min(count, len(people) - 1))])
    return ["validation" if group in held_out else "train" for group in groups]


def with_test(groups: Sequence[str], parts: Sequence[str], rule: Rule) -> list[str]:
    """`parts` in which half of the groups held out for validation are for the test.

    A group's own hash decides, another one than `divide` goes by: under the rule `hashed` alone, so that other groups
    may come and go and about half are taken. Parts that have a test already, or one group alone to hold out, stay as
    they are.
    """
    held_out = sorted({group for group, part in zip(groups, parts, strict=True) if part == PARTS[1]}, key=_coin)
    if TEST in parts or len(held_out) < 2:
        return list(parts)
    count = sum(_coin(group) < 0.5 for group in held_out) if rule == "hashed" else len(held_out) // 2
    test = set(held_out[: max(1, min(count, len(held_out) - 1))])
    return [TEST if group in test and part == PARTS[1] else part for group, part in zip(groups, parts, strict=True)]


def merged(names: Sequence[str], groups: Sequence[str], parts: Sequence[str], kept: Split) -> list[str]:
    """`parts`, but images that `kept` knows stay where they were, and with them new images of the same people."""
    of_image = {name: part for part, images in kept.parts.items() for name in images}
    of_group = {group: of_image[name] for name, group in zip(names, groups, strict=True) if name in of_image}
    return [
        of_image.get(name) or of_group.get(group) or part
        for name, group, part in zip(names, groups, parts, strict=True)
    ]


def compare(saved: Split, now: Split) -> list[str]:
    """Lines that say how the data of `now` differ from those of `saved`; none where they are the same."""
    before, after = _flat(saved), _flat(now)
    common = before.keys() & after.keys()
    found = {
        "new images": sorted(after.keys() - before.keys()),
        "missing images": sorted(before.keys() - after.keys()),
        "changed images": sorted(name for name in common if before[name][1] != after[name][1]),
        "images in another part": sorted(name for name in common if before[name][0] != after[name][0]),
    }
    lines = [f"{len(names)} {what} ({listing(names)})" for what, names in found.items() if names]
    if saved.decoding != now.decoding:
        lines.append(f"files are decoded by other rules (version {saved.decoding}, now {now.decoding})")
    return lines


def listing(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, for a message."""
    return ", ".join(map(shown, names[:most])) + (", …" if len(names) > most else "")


def _flat(split: Split) -> dict[str, tuple[str, str]]:
    return {name: (part, digest) for part, images in split.parts.items() for name, digest in images.items()}


def _place(group: str, person: bytes = b"") -> float:
    """A place in [0, 1) for a group, from its name alone; another `person` gives another order."""
    digest = hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8, person=person).digest()
    return int.from_bytes(digest, "big") / 2**64


def _coin(group: str) -> float:
    return _place(group, b"test")
