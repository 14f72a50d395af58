"""The images of a folder: which files belong to it, and what was left out, by reason and suffix."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .decode import shown

__all__ = ["SUFFIXES", "Tree", "walk"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".bmp", ".tif", ".tiff", ".webp"}
# Folders that systems and programs put beside images, often with copies of them. Names with a dot in front count too.
SERVICE = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
SHOWN = 12  # kinds of what was left out


class Tree(NamedTuple):
    """What a folder holds."""

    files: list[Path]  # images, in the order of their paths
    left_out: Counter[tuple[str, str]]  # (reason, suffix) → count


class _Walk:
    """Goes through what is really there first and follows links afterwards.

    A file or folder that two paths lead to is taken once, under its own path if it has one here, and a link to a folder
    above ends.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = Tree([], Counter())
        self.seen = {(above.stat().st_dev, above.stat().st_ino) for above in root.resolve().parents}
        self.links: list[Path] = []

    def run(self) -> Tree:
        self.enter(self.root)
        while self.links:
            links, self.links = sorted(self.links, key=lambda link: link.parts), []
            for link in links:
                self.visit(link)
        self.tree.files.sort(key=lambda file: file.parts)
        return self.tree

    def enter(self, folder: Path) -> None:
        pending = [folder]
        while pending:
            folder = pending.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
                first_visit = self.is_new(folder.stat())
            except OSError:
                self.leave("cannot be read", folder)
                continue
            if not first_visit:
                self.leave("a second path to the same folder", folder)
                continue
            ours = _ours({entry.name for entry in entries}, folder)
            if ours == "all" and folder != self.root:
                self.leave("our own run or cache", folder)
                continue
            folders = []
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith(".") or entry.name.lower() in SERVICE:
                    self.leave("hidden or service", path)
                elif ours and entry.name == "figures":
                    self.leave("our own run or cache", path)
                elif entry.is_symlink():
                    self.links.append(path)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                else:
                    self.visit(path)
            pending += reversed(folders)  # in the order of their names

    def visit(self, path: Path) -> None:
        """A file, or whatever a link leads to."""
        try:
            status = path.stat()
        except OSError:
            self.leave("link to nothing", path)
            return
        if stat.S_ISDIR(status.st_mode):
            self.enter(path)
        elif path.suffix.lower() not in SUFFIXES:
            self.leave("no image", path)
        elif not stat.S_ISREG(status.st_mode):
            self.leave("no regular file", path)
        elif self.is_new(status):
            self.tree.files.append(path)
        else:
            self.leave("a second path to the same file", path)

    def is_new(self, status: os.stat_result) -> bool:
        known = (status.st_dev, status.st_ino) in self.seen
        self.seen.add((status.st_dev, status.st_ino))
        return not known or not status.st_ino  # 0 where a file system does not number its files

    def leave(self, reason: str, path: Path) -> None:
        """Counts `path`; of a folder that was not entered, the files below it."""
        linked = path.is_symlink() and path.is_dir()
        if linked or reason in ("cannot be read", "a second path to the same folder"):
            self.tree.left_out[reason, "folder"] += 1
            return
        for file in _files_below(path):
            self.tree.left_out[reason, file.suffix.lower() or "without suffix"] += 1


def walk(root: Path) -> Tree:
    """The images below `root`, through links too, without hidden and service folders and our own runs.

    Raises:
        ValueError: there are none.
    """
    tree = _Walk(root).run()
    if not tree.files:
        found = f"; left out: {describe(tree.left_out)}" if tree.left_out else ""
        raise ValueError(f"{shown(str(root))} has no images ({', '.join(sorted(SUFFIXES))}){found}")
    return tree


def describe(left_out: Counter[tuple[str, str]]) -> str:
    """What was left out, most frequent first."""
    kinds = left_out.most_common()
    text = ", ".join(f"{count} {shown(suffix)[:20]} ({reason})" for (reason, suffix), count in kinds[:SHOWN])
    rest = sum(count for _, count in kinds[SHOWN:])
    return text + (f", {rest} of {len(kinds) - SHOWN} other kinds" if rest else "")


def _files_below(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)


def _ours(names: set[str], folder: Path) -> str | None:
    """ "all" of a run's or a cache's folder, "figures" of a comparison's, None of any other."""
    if {"images.npy", "index.json"} <= names:
        return "all"
    if "config.json" in names and ("checkpoints" in names or "metrics.jsonl" in names):
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):  # damaged: the other names decide
            return "all" if {"checkpoints", "metrics.jsonl"} <= names else None
        if isinstance(config, dict) and {"data", "model", "objective", "training"} <= set(config):
            return "all"
    return "figures" if "comparison.json" in names else None
