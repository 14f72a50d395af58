"""The command line: presets, help, every command end to end on a small run, and errors without tracebacks."""

import json
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sosvae_cases import before_step, signalled

from sosvae import PRESETS, Run, commands
from sosvae.cli import main
from sosvae.commands.compare import FOLDERS, GLOBAL_LOCAL, ONE_SIGMA, missed
from sosvae.training import loop

# fmt: off
SMALL = [
    "--data.height=16", "--data.width=16", "--model.rank=2", "--model.latents=3",
    "--model.width=0.07", "--model.depth=1",
    "--training.steps=4", "--training.mean-only-steps=1", "--training.batch=8", "--training.log-every=1",
    "--training.evaluate-batches=1", "--training.device=cpu", "--training.no-tensorboard", "--quiet",
]
# fmt: on


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return ["--data.cache", str(tmp_path_factory.mktemp("cache"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", "faces", *SMALL, *cache, "--folder", str(folder)]) == 0
    return Run.open(folder)


def test_train_takes_options_over_the_preset(run):
    config = run.config
    assert (config.model.rank, config.training.steps, config.training.tensorboard) == (2, 4, False)
    assert config.objective == PRESETS["faces"][1].objective
    assert run.load().step == 4


def test_default_preset_is_faces_and_default_folder_its_name(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, *cache, "--training.steps", "1"]) == 0
    assert (tmp_path / "runs" / "faces" / "config.json").is_file()
    assert "checkpoint of step 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_resume_takes_the_configuration_of_the_run(cache, tmp_path, form):
    folder = str(tmp_path / "run")
    assert main(["train", *SMALL, *cache, "--training.steps", "1", "--folder", folder]) == 0
    resume = ["--resume", folder] if form == "two words" else [f"--resume={folder}"]
    assert main(["train", *resume, "--training.steps", "3", "--quiet"]) == 0
    assert Run.open(folder).load().step == 3
    assert Run.open(folder).config.model.rank == 2


def test_sample_and_reconstruct_write_pictures(run, tmp_path, capsys):
    assert main(["sample", str(run.folder), "--codes", "3", "--samples", "2"]) == 0
    assert main(["reconstruct", str(run.folder), "--images", "3", "--out", str(tmp_path / "r.png")]) == 0
    assert main(["sample", str(run.folder), "--step", "4", "--out", str(tmp_path / "s.png")]) == 0
    printed = capsys.readouterr().out
    for path in (run.figures / "samples.png", tmp_path / "r.png", tmp_path / "s.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in printed


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("compare") / "faces"
    args = ["compare", "faces", *SMALL, *cache, "--folder", str(folder)]
    assert main(args) == 0
    return folder, args


def test_compare_trains_all_and_writes_figures_and_numbers(comparison):
    folder, _ = comparison
    configs = {name: Run.open(folder / place).config for name, place in FOLDERS.items()}
    assert [config.model.head for config in configs.values()] == [
        "pixelwise",
        "pixelwise",
        "global-local",
        "structured",
    ]
    beta, head = (Run.open(folder / name).load().weights for name in ("beta-vae", "global-local"))
    assert torch.equal(beta["decoder.0.weight"], head["decoder.0.weight"])
    result = json.loads((folder / "comparison.json").read_text())
    assert result["models"].keys() == {ONE_SIGMA, *FOLDERS}
    assert (result["part"], result["images"]) == ("test", 40)
    for name, place in FOLDERS.items():
        last = json.loads((folder / place / "metrics.jsonl").read_text().splitlines()[-1])
        assert result["models"][name]["neighbour_correlation"] == last["neighbour_correlation"]
        assert result["models"][name]["bits"] > 0
    files = sorted(path.name for path in (folder / "figures").iterdir())
    kinds = ["common", "difference", "mean", "negative", "positive", "reconstructions", "sample", "sheet", "variance"]
    assert files == [f"{kind}.png" for kind in kinds]
    assert sorted(result["figures"]) == [f"figures/{name}" for name in files]


def test_compare_again_trains_nothing_and_prints_the_numbers(comparison, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train_step", lambda *args: pytest.fail("trained again"))
    folder, args = comparison
    assert main(args) == 0
    shown = capsys.readouterr().out
    for part in (
        *FOLDERS,
        ONE_SIGMA,
        "uniform",
        "δᵀΣ⁻¹δ/N",
        "residual's",
        "missed: global-local",
        str(folder / "comparison.json"),
        "sheet.png",
    ):
        assert part in shown


def test_compare_that_is_interrupted_can_be_called_again(cache, tmp_path):
    args = ["compare", *SMALL, *cache, "--folder", str(tmp_path / "c")]
    with before_step(signalled(signal.SIGINT), 0):
        assert main(args) == 130
    assert not (tmp_path / "c" / "global-local").exists()
    assert main(args) == 0


def test_expectations_are_checked_against_the_numbers():
    right = {"bits": 5.0, "squares": 1.0, "inside_0.5": 0.52, "inside_0.9": 0.88}
    right |= {f"{axis}_{of}": 0.7 for axis in ("horizontal", "vertical") for of in ("samples", "residual")}
    others = {name: {"bits": 6.4} for name in (ONE_SIGMA, *FOLDERS) if name != GLOBAL_LOCAL}
    assert missed({**others, GLOBAL_LOCAL: right}) == []
    wrong = {"bits": 5.2, "squares": 1.3, "inside_0.5": 0.44, "inside_0.9": 0.96, "vertical_samples": 0.4}
    for name, value in wrong.items():
        (line,) = missed({**others, GLOBAL_LOCAL: right | {name: value}})
        assert line.startswith("global-local: ")
    assert len(missed({**others, GLOBAL_LOCAL: dict.fromkeys(right, float("nan"))})) == 5


def test_colour_goes_through_every_picture(tmp_path, cache):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    source = ["--data.source", f"folder:{tmp_path / 'in'}", "--data.channels", "3"]
    args = [*SMALL, *cache, *source, "--folder", str(tmp_path / "out"), "--training.tensorboard"]
    assert main(["compare", *args]) == 0


@pytest.mark.parametrize("command", ["train", "compare", "sample", "reconstruct", "fit"])
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    if command in ("train", "compare"):
        for part in ("--data.source", "--model.rank", "--objective.kl-slack", "(nats)", "--training.steps", "(count)"):
            assert part in shown


def test_help_of_the_whole(capsys):
    assert main([]) == 0
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for part in ("train", "sample", "reconstruct", "compare", "fit", *PRESETS):
        assert part in shown


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["dance"], 2, "unknown command 'dance'"),
        (["train", "imagenet"], 1, "unknown preset 'imagenet'"),
        (["train", "celeba", "--quiet", "--folder", "{tmp}/x"], 1, "celeba is not a folder"),
        (["train", "--resume", "{tmp}/nothing"], 1, "not the folder of a run"),
        (
            ["train", "--training.device", "nope", "--folder", "{tmp}/x"],
            1,
            "device is 'nope', expected auto, cpu or a device",
        ),
        (["sample", "{tmp}/nothing"], 1, "not the folder of a run"),
        (
            ["compare", "--folder", "{tmp}/x", "--training.device", "meta"],
            1,
            "device is 'meta', which holds no numbers",
        ),
    ],
)
def test_errors_are_one_line(args, status, message, tmp_path, capsys):
    assert main([part.format(tmp=tmp_path) for part in args]) == status
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nope", "", "mps", "meta", "hpu", "cpu:x"])
@pytest.mark.parametrize("command", ["train", "compare", "sample", "reconstruct"])
def test_devices_are_checked_alike(run, cache, tmp_path, command, device, monkeypatch, capsys):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("sosvae.training.loop.train_step", lambda *args: pytest.fail("trained"))
    name = "device" if command in ("sample", "reconstruct") else "training.device"
    args = [str(run.folder)] if name == "device" else [*SMALL, *cache, "--folder", str(tmp_path / "x")]
    assert main([command, *args, f"--{name}={device}"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"sosvae {command}: device is {device!r}")
    assert len(shown) < 400
    assert shown.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["sample", "reconstruct"])
def test_auto_is_a_device_of_every_command(run, tmp_path, command):
    assert main([command, str(run.folder), "--device", "auto", "--out", str(tmp_path / "x.png"), "--samples", "0"]) == 0


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["sample", "x", "--codes", "0"], "codes is 0, expected at least 1"),
        (["sample", "x", "--samples", "-1"], "samples is -1, expected at least 0"),
        (["sample", "x", "--seed", "-1"], "seed is -1, expected 0 to"),
        (["compare", "--temperature-global", "inf"], "temperature_global is inf, expected at least 0, finite"),
        (["train", "--data.shift", "40"], "shift is 40, expected at least 0 and less than height and width"),
        (["reconstruct", "x", "--images", "0"], "images is 0, expected at least 1"),
        (["reconstruct", "x", "--samples", "-1"], "samples is -1, expected at least 0"),
        (["train", "--training.lr", "inf"], "lr is inf, expected a positive step size"),
        (["train", "--objective.kl-slack", "nan"], "kl_slack is nan, expected at least 0"),
    ],
)
def test_options_out_of_range_are_named(args, named, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert named in " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def test_what_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    for name in [name for name in sys.modules if name.startswith("sosvae.commands.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["train"]) == 1
    assert "tyro" in (shown := capsys.readouterr().err)
    assert "pip install sosvae[train]" in shown


def test_the_package_imports_nothing_before_it_is_asked():
    code = "import sys, sosvae.cli; print('torch' in sys.modules); print(sosvae.Config().model.rank); sosvae.data.cache"
    code += "; print(hasattr(sosvae, 'nope'), 'train' in dir(sosvae))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert shown.stdout.split() == ["False", "25", "False", "True"], shown.stderr


def test_values_out_of_range_are_named_with_their_place(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model.rank", "0"])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "model" in shown
    assert "rank is 0" in shown


def test_a_command_is_a_file(tmp_path, monkeypatch, capsys):
    code = '"""Dance."""\n\nUSAGE = "[STEPS]"\n\n\ndef main(args):\n    return len(args)\n'
    (tmp_path / "side_step.py").write_text(code)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    assert main(["side-step", "one", "two"]) == 2
    assert main(["--help"]) == 0
    assert re.search(r"sosvae side-step \[STEPS\] +Dance\.", capsys.readouterr().out)


def test_python_dash_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sosvae", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("sosvae", run_name="__main__")
    assert stop.value.code == 0
    assert "usage: sosvae" in capsys.readouterr().out


def test_pictures_of_a_covariance_show_its_signs():
    from sosvae import VAE, Config, DataConfig, ModelConfig
    from sosvae.tools.figures import predict

    config = Config(data=DataConfig(height=16, width=16, channels=3), model=ModelConfig(rank=2, latents=3, width=0.1))
    vae = VAE(config).eval()
    torch.nn.init.normal_(vae.head.factor.weight)
    prediction = predict(vae, 2)
    p = vae.decode(torch.zeros(2, 3))
    assert prediction.covariance.shape == (2, 3, 16, 16)
    torch.testing.assert_close(prediction.sample - prediction.mean, prediction.difference)
    # Channel c against the central pixel of channel c, without d: a row of PPᵀ.
    torch.manual_seed(0)
    p = vae.decode(torch.randn(2, 3))
    centre = 1 * 256 + 8 * 16 + 8
    row = (p.cov_factor @ p.cov_factor[:, centre, :, None])[..., 0]
    torch.testing.assert_close(prediction.covariance[:, 1], row.unflatten(-1, (3, 16, 16))[:, 1].detach())
