"""The model of a training step's memory, held against torch's allocator; what fits, and the documents' table of it."""

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sosvae_cases import set_training

from bench import fit as bench_fit
from bench.fit import Point
from sosvae import PRESETS, Config, DataConfig, ModelConfig, TrainingConfig, beta_vae
from sosvae.cli import main
from sosvae.evaluation import samples
from sosvae.planning.fit import GIB, Budget, fit, largest_side
from sosvae.planning.memory import PRIME_BATCH, PRIME_SIDES, StepMemory, _dry_run, _Sizes, formulated, with_images
from sosvae.tools import figures
from sosvae.training import loop

DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"


@pytest.mark.parametrize(
    "point",
    [
        Point(64, 4, "reference", "none", "float32", width=0.25),
        Point(64, 4, "kernels", "blocks", "float32", width=0.25),
        Point(64, 4, "linear", "none", "float32", width=0.25),
        Point(64, 4, "linear", "stages", "float32", width=0.25),
        Point(64, 4, "linear", "stages", "bfloat16", width=0.25),
        Point(64, 4, "linear", "none", "float32", accumulate=2, width=0.25),
    ],
    ids=lambda p: f"{p.formulation}-{p.checkpointing}-{p.precision}-{p.accumulate}",
)
def test_peaks_are_those_of_the_allocator(point):
    assert bench_fit.predict(point) == pytest.approx(bench_fit.measure_allocator(point), rel=0.1)


def test_evaluation_takes_less_than_a_step(monkeypatch):
    """Validation in float32, the quality of samples and the pictures, beside the step that saves most."""
    side = 96
    monkeypatch.setattr(samples, "quality", functools.partial(samples.quality, codes=2))
    x = torch.rand(8, 3, side, side)
    images = SimpleNamespace(first=lambda part, count: x[:count], deviation=lambda: 0.3)
    point = Point(side, 2, "linear", "stages", "bfloat16", accumulate=2, width=0.25)
    step, _ = bench_fit._prepared(point)
    peak = bench_fit._allocator_peak(step)
    config = bench_fit._config(point)
    model = formulated(config, "linear")

    def evaluation():
        loop.evaluate(model, images, config, torch.device("cpu"))
        figures.panels(model, x)

    evaluation()
    assert bench_fit._allocator_peak(evaluation) < peak


SMALL = Config(
    data=DataConfig(height=64, width=64, channels=3),
    model=ModelConfig(width=0.25, depth=1, latents=16, rank=8),
    training=TrainingConfig(batch=4, mean_only_steps=0),
)


@pytest.mark.parametrize(("height", "width", "batch"), [(16, 16, 2), (37, 50, 3), (218, 178, 2)])
def test_recorded_sizes_match_a_real_step(height, width, batch):
    there = _dry_run(with_images(SMALL, height, width, batch), "linear", False)
    prime = _dry_run(with_images(SMALL, PRIME_SIDES[0], PRIME_SIDES[0], PRIME_BATCH), "linear", False)
    assert prime.events == there.events
    assert _Sizes(prime).at(height, width, batch).tolist() == np.minimum(there.sizes, there.caps).tolist()


def test_numbers_of_the_dry_run_are_primes_and_halve():
    for n in (*PRIME_SIDES, PRIME_BATCH):
        assert all(n % k for k in range(2, int(n**0.5) + 1))
    for finer, coarser in itertools.pairwise(PRIME_SIDES):
        assert coarser == -(-finer // 2)


def test_peak_is_the_sum_of_its_parts_and_grows():
    memory = StepMemory(SMALL)
    peaks = [memory.peak(side, 4) for side in (16, 64, 256, 1024)]
    assert all(p.total == p.weights + p.network + p.likelihood for p in peaks)
    assert [p.total for p in peaks] == sorted(p.total for p in peaks)
    assert memory.peak(256, 4, 4).total < memory.peak(256, 4, 2).total < memory.peak(256, 4).total
    # The decoder's first layer grows with the image: weights and Adam's states, 12 bytes, if not the gradient yet.
    assert memory.peak(1024, 1).weights - memory.peak(512, 1).weights >= 12 * 16**2 * (128**2 - 64**2)


def test_what_saves_memory_does():
    def total(formulation="linear", **training):
        return StepMemory(set_training(SMALL, **training), formulation).peak(512, 4).total

    assert total("reference") > total("kernels") > total()
    assert total() > total(checkpointing="blocks") > total(checkpointing="stages")
    assert total(precision="bfloat16") < 0.65 * total()


def test_fit_is_the_last_that_fits():
    budget = 0.5 * GIB
    config = beta_vae(SMALL)  # three ways of training it fewer
    found = fit(config, budget)
    assert [(f.formulation, f.precision, f.checkpointing) for f in found] == [
        ("pixelwise", precision, checkpointing)
        for precision in ("float32", "bfloat16")
        for checkpointing in ("none", "blocks", "stages")
    ]
    for f in found:
        memory = StepMemory(set_training(config, precision=f.precision, checkpointing=f.checkpointing))
        for size, peak, at in (
            (f.side, f.side_peak, lambda n, memory=memory: memory.peak(n, 4)),
            (f.accumulated_side, f.accumulated_peak, lambda n, memory=memory: memory.peak(n, 4, 4)),
            (f.batch, f.batch_peak, lambda n, memory=memory: memory.peak(None, n)),
        ):
            assert peak == at(size)
            assert peak.total <= budget < at(size + (1 if size == f.batch else 8)).total


def test_mean_only_phase_is_counted():
    with_phase = set_training(SMALL, mean_only_steps=1)
    assert len(StepMemory(with_phase).phases) == 2
    assert StepMemory(with_phase).peak(256, 4).total >= StepMemory(SMALL).peak(256, 4).total


# --- The command --------------------------------------------------------------------------------------------

OPTIONS = ["--model.width=0.25", "--model.depth=1", "--training.mean-only-steps=0", "--model.head=pixelwise"]


def test_command_prints_a_table_and_json(capsys):
    assert main(["fit", "celeba-64-grey", "--memory", "1", *OPTIONS]) == 0
    shown = capsys.readouterr().out
    for part in (
        "within 1 GiB, 0.5 of them in reserve, grey images",
        "batch, 64×64",
        "side, batch 32",
        "bfloat16",
        "stages",
        "A model",
        "--reserve",
    ):
        assert part in shown
    assert main(["fit", "celeba-64-grey", "--memory", "1", "--reserve", "0.25", *OPTIONS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["memory"], found["reserve"]) == (GIB, GIB // 4)
    assert (found["images"], found["batch"]) == ([1, 64, 64], 32)
    for row in found["fits"]:
        assert row["side_peak"]["total"] <= 0.75 * GIB
        assert row["side_peak"]["binds"] in ("weights", "network", "likelihood")
        assert row["formulation"] == "pixelwise"


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (["--memory=-1"], "memory is -1 GiB, expected a positive number"),
        (["--memory=0"], "memory is 0 GiB"),
        (["--memory=nan"], "memory is nan GiB"),
        (["--memory=inf"], "memory is inf GiB"),
        (["--memory=0.4"], "reserve is 0.5 GiB, expected at least 0 and less than the memory, 0.4 GiB"),
        (["--memory=4", "--reserve=-1"], "reserve is -1 GiB"),
        (["--memory=4", "--reserve=nan"], "reserve is nan GiB"),
        (["--memory=0.01", "--reserve=0"], "0.01 GiB are left for tensors, but a step on one image of 16×16 takes"),
    ],
    ids=" ".join,
)
def test_budgets_that_cannot_be_are_one_line(memory, message, capsys):
    assert main(["fit", "celeba-64-grey", *memory, *OPTIONS]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_a_tenth_of_the_memory_is_in_reserve():
    assert Budget.of(80) == (80 * GIB, 8 * GIB)
    assert Budget.of(4).tensors == 3.5 * GIB
    assert Budget.of(16, 0).tensors == 16 * GIB


def test_table_of_the_document_is_what_the_model_says():
    text = DOCUMENT.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- python -m bench\.fit --table -->\n\n(.*?)\n\n<!-- /bench\.fit -->", text, re.S)
    assert shown == bench_fit.table()


def test_side_of_a_configuration_as_it_stands():
    config = dataclasses.replace(PRESETS["faces"][1], training=TrainingConfig(batch=4, accumulate=2, mean_only_steps=0))
    side = largest_side(config, "linear", 0.25 * GIB)
    assert StepMemory(config).peak(side, 4, 2).total <= 0.25 * GIB < StepMemory(config).peak(side + 8, 4, 2).total
    assert largest_side(config, "linear", 1.0) == 0


def test_an_unknown_formulation_is_an_error():
    with pytest.raises(ValueError, match="formulation is 'kernel', expected one of reference, kernels, linear"):
        StepMemory(PRESETS["faces"][1], "kernel")
