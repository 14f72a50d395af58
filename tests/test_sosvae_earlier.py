"""Runs that version 0.1 wrote open, predict what they did then, and train on.

`fixtures/run-0.1.zip` holds a run of each head after six steps on `pictures`, and `expected.json`, what 0.1 found in
them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sosvae_cases import rows, set_training

from sosvae import Run, train

FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.zip"
RELATIVE = 1e-3  # float32 through a dozen layers, on another processor


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the fixture is unpacked; paths in the configurations are relative to it."""
    shutil.unpack_archive(FIXTURE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wave(*shape):
    """Fixed values between −1 and 1, as no generator of random numbers has to reproduce them."""
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(n, dtype=torch.float64).square()).float().reshape(shape)


@torch.no_grad()
def found(run):
    """Numbers that a prediction of the run comes to."""
    vae = run.model()
    x = wave(2, *vae.image_shape).mul(0.5).add(0.5)
    p = vae.decode(vae.encode(x).loc + wave(2, vae.latents))
    sample = p.rsample((), noise=(wave(2, run.config.model.rank), wave(2, *p.event_shape)))
    log_prob, entropy = p.log_prob_and_entropy(x.flatten(1))
    parts = {"loc": p.loc, "variance": p.variance, "sample": sample, "row": p.covariance_row(100)}
    values = {"log_prob": log_prob.tolist(), "entropy": entropy.tolist()}
    return values | {name: [part.sum(), part.square().sum(), part[1, 100]] for name, part in parts.items()}


def expected_of(folder, name):
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize("name", ["structured", "pixelwise"])
def test_run_of_0_1_predicts_what_it_did(folder, name):
    run = Run.open(folder / name)
    assert run.steps() == [6]
    assert run.config.model.head == name
    values = found(run)
    for part, expected in expected_of(folder, name)["found"].items():
        torch.testing.assert_close(
            torch.tensor(values[part]),
            torch.tensor(expected),
            rtol=RELATIVE,
            atol=1e-6,
            msg=lambda m, part=part: part + m,
        )


@pytest.mark.parametrize("name", ["structured", "pixelwise"])
def test_run_of_0_1_trains_on(folder, name):
    run = Run.open(folder / name)
    before = rows(run)
    run = train(set_training(run.config, steps=8), folder / name, resume=True, progress=False)
    assert run.load().step == 8
    assert rows(run)[: len(before)] == before
    train_row, validation_row = rows(run)[len(before) :]
    assert (train_row.pop("kind"), validation_row["kind"]) == ("train", "validation")
    # Evaluation sees biases before batch norm, whose gradient is rounding, which Adam divides by its own size.
    assert train_row == pytest.approx(expected_of(folder, name)["train"], rel=RELATIVE)
