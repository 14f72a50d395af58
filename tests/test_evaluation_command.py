"""`sosvae evaluate`: every row of every head, resumed to the same numbers, and errors that say what is missing."""

import csv
import json
import math
import shutil
from functools import partial

import pytest
from PIL import Image
from sosvae_cases import faces

from sosvae import Run, train
from sosvae.cli import main
from sosvae.data import Split
from sosvae.evaluation import evaluate, features, ledger, measure, normal
from sosvae.presets import beta_vae
from sosvae.training.head import of_run, train_head

HEADS = {"structured": {}, "pixelwise": {}, "precision": {}, "global-local": {}, "heavy": {}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each head on the faces, of which nobody expects anything."""
    root = tmp_path_factory.mktemp("runs")
    config = faces(root / "cache").replace(
        training={"steps": 4, "mean_only_steps": 1, "evaluate_every": 4, "save_every": 4}, data={"validation": 0.2}
    )
    found = {}
    for head in HEADS:
        settings = (beta_vae(config) if head == "pixelwise" else config).replace(model={"head": head})
        found[head] = train(settings, root / head, progress=False).folder
    return found


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(ledger, "CHUNK", 2 * measure.BLOCK)
    monkeypatch.setattr(features, "SIDE", 4)  # eigenvalues of 48×48 take no time


SMALL = ["--quiet", "--features=pixels", "--codes=2", "--samples=2", "--repeats=2", "--refit-steps=5"]
SMALL += ["--temperatures-global", "0.5", "1", "--temperatures-local", "0", "1"]


def run_command(runs, out, *more):
    args = [str(folder) for folder in runs]
    assert main(["evaluate", *args, *SMALL, f"--out={out}", *more]) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_every_head_has_every_row(runs, tmp_path, capsys):
    result = run_command(runs.values(), tmp_path, "--images=20")
    likelihood = {(row["run"], row["row"]): row for row in result["likelihood"]}
    for head in HEADS:
        own = likelihood[head, head]
        assert own["weights"] != likelihood["structured", "one σ for all pixels"]["weights"] or head == "structured"
        for name in (head, "one σ for all pixels", "pixel-wise head refitted"):
            row = likelihood[head, name]
            for number in ("bits", "bits_error", "bits_likelihood", "squares", "inside_0.5", "inside_0.9", "energy"):
                assert math.isfinite(row[number]), (head, name, number)
            assert row["images"] == 20
            assert row["values"] == 17 * 16
            assert row["variance"] == "exact"
    assert likelihood["", "uniform"]["bits"] == 8
    for row in result["samples"]:
        assert row["features"] == "pixels"
        assert row["called"] == "FD"
        assert row["real_images"] == row["generated_images"] == 20
        assert "antialiased" in row["resize"]
        assert "fewer images than the 48 features" in row["notes"]
        assert row["floor"] > 0
    rows = {(row["run"], name) for row in result["samples"] for name in row["row"].split(", ")}
    for head in HEADS:
        for name in ("means", "samples", "best temperatures", "best with t_P ≥ 0.5", "training images"):
            assert (head, name) in rows
        points = {(p["t_P"], p["t_L"]) for p in result["curves"][head]}
        both = {(0.5, 0.0), (0.5, 1.0), (1.0, 0.0), (1.0, 1.0)}
        assert points == (both if head in ("structured", "global-local", "heavy") else {(1.0, 0.0), (1.0, 1.0)})
    printed = capsys.readouterr().out
    assert (tmp_path / "evaluation.md").read_text().strip() in printed
    table = [line for line in printed.splitlines() if line.startswith("| global-local | samples |")]
    weights = likelihood["global-local", "global-local"]["weights"][:8]
    for part in ("(1, 1)", "†", "clipped and rounded to bytes", "4×4, bilinear, antialiased", weights):
        assert part in table[0]
    with (tmp_path / "samples.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(result["samples"])
    with Image.open(tmp_path / "temperatures.png") as picture:
        assert picture.width > 2 * picture.height


def test_stopped_and_started_again_it_comes_to_the_same(runs, tmp_path, monkeypatch):
    one = [runs["global-local"]]
    whole = run_command(one, tmp_path / "whole")
    done = 0
    of_block = measure.of_block

    def stopping(*args, **options):
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt
        return of_block(*args, **options)

    monkeypatch.setattr(measure, "of_block", stopping)
    assert main(["evaluate", str(one[0]), *SMALL, f"--out={tmp_path / 'parts'}"]) == 130
    done = 100
    assert run_command(one, tmp_path / "parts") == whole
    assert done == 100 + 6  # of three rows of three blocks the first row was kept; the second had no whole chunk
    kept = next((tmp_path / "parts" / "work").glob("*/00000000-00000032.npz"))
    kept.write_bytes(kept.read_bytes()[:100])  # cut short
    assert run_command(one, tmp_path / "parts") == whole


def test_any_batch_size_gives_the_same_numbers(runs, tmp_path):
    a, b = (
        run_command([runs["structured"]], tmp_path / str(batch), f"--batch={batch}", "--no-baselines")
        for batch in (7, 32)
    )
    for x, y in zip(a["samples"], b["samples"], strict=True):
        assert x["distance"] == pytest.approx(y["distance"], rel=1e-6)
        assert x["kernel"] == pytest.approx(y["kernel"], rel=1e-5, abs=1e-9)
    assert a["likelihood"] == b["likelihood"]


def test_selection_decides_and_test_images_report(runs, tmp_path, monkeypatch):
    """The curve is over selection images alone, and no row is."""
    seen = []
    indices = evaluate.Subject.indices

    def recorded(subject, part, count=None):
        seen.append(part)
        return indices(subject, part, count)

    monkeypatch.setattr(evaluate.Subject, "indices", recorded)
    result = run_command([runs["structured"]], tmp_path)
    assert {"validation", "test"} <= set(seen)
    assert {point["images"] for point in result["curves"]["structured"]} == {40}
    run = Run.open(runs["structured"])
    assert not set(run.split.parts["validation"]) & set(run.split.parts["test"])


def test_a_run_of_two_parts_gets_a_test_part_for_good(runs, tmp_path):
    shutil.copytree(runs["pixelwise"], tmp_path / "old")
    run = Run.open(tmp_path / "old")
    parts = {part: dict(images) for part, images in run.split.parts.items()}
    parts["validation"] |= parts.pop("test")
    Split(run.split.rule, run.split.decoding, parts).write(run.folder / "split.json")
    run_command([run.folder], tmp_path / "out", "--no-baselines")
    assert set(run.split.parts["validation"]) | set(run.split.parts["test"]) == set(parts["validation"])
    assert run.split.parts["train"] == parts["train"]
    kept = run.split
    run_command([run.folder], tmp_path / "out", "--no-baselines")
    assert run.split == kept


def test_normals_over_the_training_images_are_rows(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(normal, "by_em", partial(normal.by_em, iterations=20))
    result = run_command([runs["pixelwise"]], tmp_path, "--features=none", "--no-baselines", "--rank=3")
    likelihood = {row["row"]: row for row in result["likelihood"]}
    for name in ("PCA, rank 3", "PPCA, closed form, rank 3", "factor analysis, EM, rank 3"):
        assert 4 < likelihood[name]["bits"] < 8
        assert likelihood[name]["bits"] == pytest.approx(likelihood[name]["bits_likelihood"], abs=1e-6)  # no code


def test_heads_on_one_network_share_the_rows_beside_them(runs, tmp_path):
    base = Run.open(runs["pixelwise"])
    head = of_run(base.config).replace(training={"steps": 1, "save_every": 1, "evaluate_every": 1})
    other = train_head(base, head.replace(model={"head_layers": 0}), tmp_path / "head", progress=False)
    result = run_command([base.folder, other.folder], tmp_path / "out", "--features=none", "--images=20")
    assert [(row["run"], row["row"]) for row in result["likelihood"]] == [
        ("pixelwise", "pixelwise"),
        ("pixelwise", "one σ for all pixels"),
        ("pixelwise", "pixel-wise head refitted"),
        ("head", "global-local"),
        ("", "uniform"),
    ]


def test_features_none_leaves_distances_out(runs, tmp_path):
    result = run_command([runs["pixelwise"]], tmp_path, "--features=none", "--no-baselines", "--images=20")
    assert result["samples"] == []
    assert [row["row"] for row in result["likelihood"]] == ["pixelwise", "uniform"]
    assert result["likelihood"][0]["images"] == 20
    assert not (tmp_path / "temperatures.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features=vgg"], "features is 'vgg', expected one of"),
        (["--images=41"], "has 40 test images, 41 are asked for"),
        (["--images=3"], "has 3 test images, expected at least 4, for distances of two halves"),
        (["--rank=400"], "rank is 400, expected at most"),
        (["--step=3"], "no checkpoint of step 3"),
        (["--device=tpu9"], "device is 'tpu9'"),
        (["--source=folder:/no/such"], "is not a folder"),
    ],
)
def test_what_cannot_be_is_one_error(runs, tmp_path, capsys, options, message):
    args = ["evaluate", str(runs["structured"]), *SMALL, f"--out={tmp_path / 'out'}", *options]
    assert main(args) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--codes=0"], ["--samples=1"], ["--repeats=0"], ["--temperatures-local", "-1"], ["--seed=-1"]]
)
def test_options_out_of_range_are_named(runs, options):
    with pytest.raises(SystemExit):
        main(["evaluate", str(runs["structured"]), *options])


def test_runs_without_a_checkpoint_or_of_nothing_are_named(runs, tmp_path, capsys):
    shutil.copytree(runs["structured"], tmp_path / "bare", ignore=shutil.ignore_patterns("step_*"))
    for folder, message in ((tmp_path / "bare", "has no checkpoint"), (tmp_path, "is not the folder of a run")):
        assert main(["evaluate", str(folder), *SMALL]) == 1
        assert message in capsys.readouterr().err
