"""The command `sosvae`: train, sample, reconstruct, compare, fit."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro

from . import data
from .config import PRESETS, Config
from .run import Run
from .trainer import NonFiniteError

__all__ = ["main"]

Options = TypeVar("Options")

COMMANDS = """\
usage: sosvae COMMAND ...

  sosvae train [PRESET] [options]     train a model; --resume FOLDER goes on with a run
  sosvae sample RUN [options]         pictures at codes from the prior: means and samples
  sosvae reconstruct RUN [options]    pictures of held-out images: means and samples at their codes
  sosvae compare [PRESET] [options]   SOS-VAE and β-VAE on the same data: figures side by side, and numbers
  sosvae edit RUN [options]           a page in the browser: paint, and the rest of the image follows
  sosvae fit [PRESET] [options]       the largest images and batches that train within so many GiB (--memory)

`sosvae COMMAND --help` lists the options of a command, with units and defaults (those of the preset given
before it).

presets:
""" + "\n".join(f"  {name:<16}{line}" for name, (line, _) in PRESETS.items())

Settings = Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class TrainOptions:
    """Train a model. Ctrl-C saves and says how to go on."""

    config: Settings = field(default_factory=Config)
    folder: Path | None = None
    """Folder of the new run; by default runs/PRESET (path)."""
    resume: Path | None = None
    """Folder of a run to go on with, under its own configuration (path)."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class CompareOptions:
    """Train a SOS-VAE and the β-VAE of equal decoder, one after the other, and set them side by side."""

    config: Settings = field(default_factory=Config)
    folder: Path | None = None
    """Folder for both runs and the figures; what is complete there is not trained again; by default runs/PRESET (path).
    """
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class SampleOptions:
    """Pictures at codes from the prior z ~ N(0, I): the mean, and samples of p(x|z)."""

    run: tyro.conf.Positional[Path]
    """Folder of the run (path)."""
    codes: int = 8
    """Codes, one column each (count)."""
    samples: int = 4
    """Samples below each mean (count)."""
    seed: int = 0
    """Of codes and samples."""
    step: int | None = None
    """Of the checkpoint; by default the latest (steps)."""
    out: Path | None = None
    """Picture to write; by default figures/samples.png in the run (path)."""
    device: str = "cpu"
    """Any name that torch knows."""


@dataclass(frozen=True)
class ReconstructOptions:
    """Pictures of held-out images: the image, the mean at its code, and samples of p(x|z)."""

    run: tyro.conf.Positional[Path]
    """Folder of the run (path)."""
    images: int = 8
    """Images, spread over the held-out ones (count)."""
    samples: int = 3
    """Samples below each mean (count)."""
    step: int | None = None
    """Of the checkpoint; by default the latest (steps)."""
    out: Path | None = None
    """Picture to write; by default figures/reconstructions.png in the run (path)."""
    device: str = "cpu"
    """Any name that torch knows."""


@dataclass(frozen=True)
class FitOptions:
    """The largest square images, and the most images of the preset's size, that train within a memory budget.

    The preset is celeba, the paper's network in colour, where none is given. One row for each formulation of the
    likelihood, precision and kind of checkpointing, so that those options of the configuration are left aside. From a
    model of a training step's memory, in which nothing is computed.
    """

    config: Settings = field(default_factory=Config)
    memory: float = 16.0
    """What there is, of a GPU or of the machine (GiB)."""
    reserve: float | None = None
    """Of it, left free for what the model does not count: the process itself, libraries' own buffers, a GPU's context,
    fragmentation. What is left is what torch's allocator may hold at the peak of a step. By default a tenth of the
    memory and at least 0.5 (GiB)."""
    json: bool = False
    """Print JSON, memory in bytes."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` by default); returns the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    command = args.pop(0) if args else "--help"
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "sample": _sample,
        "reconstruct": _reconstruct,
        "compare": _compare,
        "fit": _fit,
        "edit": _edit,
    }
    if command in ("--help", "-h"):
        print(COMMANDS)
        return 0
    if command not in commands:
        print(f"sosvae: unknown command {command!r}, expected one of {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        return commands[command](args)
    except (
        NonFiniteError,
        OSError,
        ValueError,
    ) as error:  # what was asked for cannot be; a traceback says no more
        print(f"sosvae {command}: {error}", file=sys.stderr)
        return 1


def _train(args: list[str]) -> int:
    from .trainer import train

    name, config, args = _preset(args)
    resumed = _value_of("--resume", args)
    if resumed is not None:
        config = Run.open(resumed).config
    o = _parse(TrainOptions, "sosvae train", args, TrainOptions(config))
    folder = o.resume or o.folder or Path("runs") / name
    run = train(o.config, folder, resume=o.resume is not None, progress=not o.quiet)
    print(f"{run.folder}: checkpoint of step {run.steps()[-1]} of {o.config.training.steps}")
    return 0


def _compare(args: list[str]) -> int:
    from .compare import compare

    name, config, args = _preset(args)
    o = _parse(CompareOptions, "sosvae compare", args, CompareOptions(config))
    folder = o.folder or Path("runs") / name
    result = compare(o.config, folder, progress=not o.quiet)
    if "unfinished" in result:
        print("the same command goes on from there, and with what is left to train")
        return 130  # as a shell counts Ctrl-C
    print(f"\n{'':10}{'neighbour correlation':>24}{'deviation over data':>22}")
    for model, values in result["models"].items():
        print(f"{model:10}{values['neighbour_correlation']:>24.3f}{values['deviation']:>22.2f}")
    print("correlation of sample − mean between horizontal neighbours: 1 smooth, 0 speckled\n")
    for expectation in result["missed"]:
        print(f"missed: {expectation}")
    print(f"numbers: {folder / 'comparison.json'}")
    print(f"figures: {folder / 'figures' / 'sheet.png'}, and in the same folder:")
    print("  " + ", ".join(Path(path).name for path in result["figures"]))
    return 0


def _fit(args: list[str]) -> int:
    from . import fit

    _, config, args = _preset(args, "celeba")
    o = _parse(FitOptions, "sosvae fit", args, FitOptions(config))
    budget = fit.Budget.of(o.memory, o.reserve)
    found = fit.fit(o.config, budget.tensors)
    if o.json:
        print(json.dumps(fit.to_json(found, o.config, budget), indent=2))
    else:
        print(fit.table(found, o.config, budget))
    return 0


def _edit(args: list[str]) -> int:
    from .commands.edit import EditOptions, edit

    return edit(_parse(EditOptions, "sosvae edit", args))


@torch.no_grad()
def _sample(args: list[str]) -> int:
    from . import figures

    o = _parse(SampleOptions, "sosvae sample", args)
    run = Run.open(o.run)
    vae = run.model(o.step, o.device)
    torch.manual_seed(o.seed)
    p = vae.decode(torch.randn(o.codes, vae.latents, device=o.device))
    rows = [("mean", vae.unflatten(p.loc).cpu())]
    rows += [("sample", vae.unflatten(p.rsample()).cpu()) for _ in range(o.samples)]
    print(figures.save_images(rows, o.out or run.figures / "samples.png"))
    return 0


def _reconstruct(args: list[str]) -> int:
    from . import figures

    o = _parse(ReconstructOptions, "sosvae reconstruct", args)
    run = Run.open(o.run)
    vae = run.model(o.step, o.device)
    x = data.load(run.config.data).first("validation", o.images)
    path = o.out or run.figures / "reconstructions.png"
    print(figures.save_reconstructions({run.config.model.head: vae}, x, path, o.samples))
    return 0


def _preset(args: list[str], name: str = "faces") -> tuple[str, Config, list[str]]:
    """The preset that `args` begin with (`name` where they do not), and the other arguments."""
    if args and not args[0].startswith("-"):
        name, *args = args
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    return name, PRESETS[name][1], args


def _value_of(option: str, args: list[str]) -> str | None:
    for i, argument in enumerate(args):
        if argument == option and i + 1 < len(args):
            return args[i + 1]
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "=")
    return None


def _parse(kind: type[Options], program: str, args: list[str], default: Any = None) -> Options:
    if default is None:
        return tyro.cli(kind, prog=program, args=args)
    return tyro.cli(kind, prog=program, args=args, default=default)
