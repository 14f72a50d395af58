"""The paper by command: plans, training until it has converged, and every target at a scale for tests."""

import json

import numpy as np
import pytest
from PIL import Image
from sosvae_cases import faces

from sosvae import Run, data
from sosvae.cli import main
from sosvae.commands import reproduce
from sosvae.data.split import TEST
from sosvae.evaluation import features
from sosvae.paper import plans, runs, targets
from sosvae.presets import PRESETS, beta_vae
from sosvae.tools import strokes
from sosvae.training.head import of_run

SIZE = 16


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """A folder of 40 images, of which the last 8 by name are for the test, and the 8 before for selection."""
    monkeypatch.setattr(plans, "HELD_OUT", 8)
    random = np.random.default_rng(0)
    for i in range(40):
        smooth = Image.fromarray(random.integers(0, 256, (4, 4)).astype(np.uint8)).resize((20, 24))
        (tmp_path / "celeba").mkdir(exist_ok=True)
        smooth.save(tmp_path / "celeba" / f"{i:06d}.png")
    return tmp_path / "celeba"


@pytest.fixture
def tiny(monkeypatch, tmp_path, celeba):
    """Runs of a few steps under the names of the real ones."""

    def made(scale, name, path):
        recipe = faces(tmp_path / "cache").replace(
            data={"source": f"folder:{celeba}", "height": SIZE, "width": SIZE},
            model={"rank": 3},
            training={"steps": 2, "mean_only_steps": 1, "evaluate_every": 2, "save_every": 1},
        )
        base = beta_vae(recipe).replace(training={"steps": 8, "keep": 4, "save_every": 2})
        head = of_run(base).replace(
            training={"steps": 2, "evaluate_every": 2, "save_every": 2}, model={"head_layers": 1}
        )
        heads = [
            plans.Plan(name, head.replace(model={"head": kind, "neighbourhood": side}), "beta-vae")
            for name, kind, side in (
                ("precision-3", "precision", 3),
                ("precision-5", "precision", 5),
                ("global-local", "global-local", 3),
            )
        ]
        return [
            plans.Plan("beta-vae", base, patience=2),
            plans.Plan("sos-vae", recipe),
            *heads,
            *plans._ablation(recipe),
        ]

    monkeypatch.setattr(plans, "plans", made)
    monkeypatch.setattr(targets, "FACTORS", targets.FACTORS[::5])
    monkeypatch.setattr(features, "SIDE", 4)  # eigenvalues of 48×48 take no time
    return celeba


def test_last_images_by_name_are_held_out(celeba, tmp_path):
    config = faces(tmp_path / "cache").data
    found = plans.last_by_name(type(config)(source=f"folder:{celeba}", height=SIZE, width=SIZE, cache=config.cache))
    names = sorted(name for part in found.parts.values() for name in part)
    assert {part: sorted(images) for part, images in found.parts.items()} == {
        "train": names[:24],
        "validation": names[24:32],
        TEST: names[32:],
    }
    assert plans.last_by_name(config) is None  # faces have people
    images = data.load(
        type(config)(source=f"folder:{celeba}", height=SIZE, width=SIZE, cache=config.cache), split=found
    )
    assert images.split == found


@pytest.mark.parametrize("scale", plans.SCALES)
@pytest.mark.parametrize("name", plans.DATA)
def test_plans_are_complete_and_of_one_network(scale, name, tmp_path):
    found = {plan.name: plan for plan in plans.plans(scale, name, tmp_path)}
    for plan in found.values():
        if plan.base is not None:
            base = found[plan.base].config
            assert plan.config.model.width == base.model.width
            assert plan.config.objective.mean == "frozen"
        assert plan.config.data.source.endswith(str(tmp_path))
        assert not (plan.patience and plan.config.training.decay)  # the step size must not depend on the end
    assert set(reproduce.TABLE[scale].get(name, ())) <= set(found)
    if scale == "paper":
        assert found["sos-vae"].config.objective == PRESETS[name][1].objective
    else:
        assert found["sos-vae"].config.image_shape == (1, 64, 64)
        assert found["sos-vae"].config.model.fixed_diagonal


def test_unknown_plans_are_named(tmp_path):
    with pytest.raises(ValueError, match="scale is 'large', expected one of paper, small"):
        plans.plans("large", "celeba", tmp_path)
    with pytest.raises(ValueError, match="no data called 'mnist'"):
        plans.plans("small", "mnist", tmp_path)


def test_training_ends_where_rounds_bring_nothing_more(tmp_path):
    run = Run(tmp_path)
    for step, value in ((2, -9.0), (4, -3.0), (6, -4.0), (8, -5.0)):
        (run.checkpoints / f"step_{step:08d}").mkdir(parents=True)
        row = {"step": step, "kind": "validation", "log_prob": value + 1, "kl": 1.0}
        with run.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "kind": "train", "log_prob": 9, "kl": 0}\n{"step"')
    assert runs._settled(run, 2)
    assert not runs._settled(run, 3)
    assert not runs._settled(run, 4)
    assert runs.best_step(run) == 4


def test_every_stroke_file_lies_on_the_image_at_both_sizes():
    import torch

    for name in ("fig6", "fig11", "fig12", "fig13", "fig14"):
        for size in ((64, 64), (218, 178), (16, 16)):
            path = reproduce.Path(targets.__file__).parent / "edits" / f"{name}.json"
            _, mask = strokes.paint(torch.zeros(1, *size), strokes.read(path, size))
            assert 0 < mask.float().mean() < 0.2


def command(tiny, out, *more):
    given = ["--quiet", f"--celeba={tiny}", f"--brain={tiny}", f"--out={out}", "--rank=2", "--features=pixels"]
    return main(["reproduce", *more, *given, "--repeats=2", "--codes=2", "--refit-steps=2"])


def test_table_and_figures_are_made_and_nothing_is_done_twice(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    chosen = {"celeba": ("beta-vae", "sos-vae", "global-local"), "brain": ("beta-vae", "precision-5")}
    monkeypatch.setitem(reproduce.TABLE, "small", chosen)
    assert command(tiny, out, "table1", "fig4", "fig5", "fig6", "fig2", "fig8") == 0
    printed = capsys.readouterr().out
    table = (out / "small" / "table1" / "table1.md").read_text()
    for name in ("beta-vae", "sos-vae", "precision-5", "global-local"):
        assert table.count(f"| {name} |") == sum(name in names for names in chosen.values())
    assert "| 90.97, 257.11 |" in table
    assert "are not FID" in table
    for picture in ("fig4/interpolation", "fig5/components", "fig6/edits", "fig2/sheet", "fig8/sheet"):
        with Image.open(out / "small" / f"{picture}.png") as image:
            assert min(image.size) > 100
    assert all(f"fig{i} (" in printed for i in (2, 4, 5, 6, 8))
    before = {path: path.stat().st_mtime_ns for path in (out / "small").rglob("step_*/weights.safetensors")}
    assert command(tiny, out, "table1") == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "small").rglob("step_*/weights.safetensors")} == before


def test_a_signal_stops_it_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    train = runs.train

    def stopped(config, folder, **options):
        return train(config.replace(training={"steps": 1}), folder, **options)

    monkeypatch.setattr(runs, "train", stopped)
    assert command(tiny, out, "fig4") == 130
    assert "the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(runs, "train", train)
    assert command(tiny, out, "fig4") == 0


def test_figure_seven_needs_no_network(tiny, tmp_path):
    out = tmp_path / "out"
    assert command(tiny, out, "fig7") == 0
    assert "PPCA" in (out / "small" / "fig7" / "normal.txt").read_text()
    assert not list(out.rglob("checkpoints"))


def test_what_is_missing_is_named_before_anything_is_trained(tiny, tmp_path, capsys):
    for args, message in (
        (["fig4"], "--celeba is not given"),
        (["fig3"], "--brain is not given"),
        (["table1", "--celeba=/no/such", "--brain=/no/such"], "which is not a folder"),
        (["fig4", "table1", f"--celeba={tiny}", f"--brain={tiny}", "--scale=paper"], "inception"),
    ):
        assert main(["reproduce", *args, f"--out={tmp_path / 'out'}"]) == 1
        assert message in capsys.readouterr().err
    for args in (["reproduce"], ["reproduce", "fig99"], ["reproduce", "fig4", "--scale=large"]):
        with pytest.raises(SystemExit):
            main(args)
    assert not (tmp_path / "out").exists()
