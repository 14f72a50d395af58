"""The model of a training step's memory, held against torch's allocator; what fits, and the README's table of it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bench import fit as bench_fit
from bench.fit import Point
from sosvae import PRESETS, Config, DataConfig, ModelConfig, TrainingConfig, beta_vae
from sosvae.cli import main
from sosvae.fit import GIB, fit, largest_side
from sosvae.memory import StepMemory, with_images

README = Path(__file__).parent.parent / "README.md"


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


SMALL = Config(
    data=DataConfig(height=64, width=64, channels=3),
    model=ModelConfig(width=0.25, depth=1, latents=16, rank=8),
    training=TrainingConfig(batch=4, mean_only_steps=0),
)


def test_sizes_between_those_that_were_run_are_exact():
    """The peak at a size is what a model made at that size says."""
    near = StepMemory(with_images(SMALL, 200, 200, 4))
    assert StepMemory(SMALL).peak(200, 4) == near.peak(200, 4) == near.peak(None, 4)


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
        config = dataclasses.replace(SMALL, training=dataclasses.replace(SMALL.training, **training))
        return StepMemory(config, formulation).peak(512, 4).total

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
        t = dataclasses.replace(config.training, precision=f.precision, checkpointing=f.checkpointing)
        memory = StepMemory(dataclasses.replace(config, training=t))
        for size, peak, at in (
            (f.side, f.side_peak, lambda n, memory=memory: memory.peak(n, 4)),
            (f.accumulated_side, f.accumulated_peak, lambda n, memory=memory: memory.peak(n, 4, 4)),
            (f.batch, f.batch_peak, lambda n, memory=memory: memory.peak(None, n)),
        ):
            assert peak == at(size)
            assert peak.total <= budget < at(size + (1 if size == f.batch else 8)).total


def test_mean_only_phase_is_counted():
    with_phase = dataclasses.replace(SMALL, training=dataclasses.replace(SMALL.training, mean_only_steps=1))
    assert len(StepMemory(with_phase).phases) == 2
    assert StepMemory(with_phase).peak(256, 4).total >= StepMemory(SMALL).peak(256, 4).total


# --- The command --------------------------------------------------------------------------------------------

OPTIONS = ["--model.width=0.25", "--model.depth=1", "--training.mean-only-steps=0", "--model.head=pixelwise"]


def test_command_prints_a_table_and_json(capsys):
    assert main(["fit", "celeba-64-grey", "--memory", "1", *OPTIONS]) == 0
    shown = capsys.readouterr().out
    for part in ("within 1 GiB, grey images", "batch, 64×64", "side, batch 32", "bfloat16", "stages", "A model"):
        assert part in shown
    assert main(["fit", "celeba-64-grey", "--memory", "1", *OPTIONS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["budget"], found["images"], found["batch"]) == (GIB, [1, 64, 64], 32)
    for row in found["fits"]:
        assert row["side_peak"]["total"] <= GIB
        assert row["side_peak"]["binds"] in ("weights", "network", "likelihood")
        assert row["formulation"] == "pixelwise"


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("-1", "memory is -1 GiB, expected a positive number"),
        ("0", "memory is 0 GiB"),
        ("nan", "memory is nan GiB"),
        ("0.01", "a step on one image of 16×16 takes"),
    ],
)
def test_budgets_that_cannot_be_are_one_line(memory, message, capsys):
    assert main(["fit", "celeba-64-grey", f"--memory={memory}", *OPTIONS]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_table_of_the_readme_is_what_the_model_says():
    text = README.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- python -m bench\.fit --table -->\n\n(.*?)\n\n<!-- /bench\.fit -->", text, re.S)
    assert shown == bench_fit.table()


def test_side_of_a_configuration_as_it_stands():
    config = dataclasses.replace(PRESETS["faces"][1], training=TrainingConfig(batch=4, accumulate=2, mean_only_steps=0))
    side = largest_side(config, "linear", 0.25 * GIB)
    assert StepMemory(config).peak(side, 4, 2).total <= 0.25 * GIB < StepMemory(config).peak(side + 8, 4, 2).total
    assert largest_side(config, "linear", 1.0) == 0
