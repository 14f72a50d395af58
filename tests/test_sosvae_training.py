"""Training: the phases, resuming bit for bit, what is on disk after a kill, losses that are not finite, Ctrl-C."""

import json
import signal
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import torch
from sosvae_cases import before_step, faces, killed, rows, same, set_training, signalled

from sosvae import VAE, NonFiniteError, Run, beta_vae, load, train
from sosvae.training import loop
from sosvae.training import run as run_module


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return faces(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("model", ["structured", "pixelwise"])
def test_resumed_run_equals_the_uninterrupted_one(config, tmp_path, model):
    config = config if model == "structured" else beta_vae(config)
    whole = train(config, tmp_path / "whole", progress=False)
    train(set_training(config, steps=6), tmp_path / "halves", progress=False)
    torch.manual_seed(99)  # nothing of this process may matter
    halves = train(config, tmp_path / "halves", resume=True, progress=False)
    a, b = whole.load(), halves.load()
    assert (a.step, b.step) == (12, 12)
    assert same(a.weights, b.weights)
    assert same(a.state, b.state)
    kept = [row for row in rows(halves) if row != rows(halves)[0] or row["step"] == 2]
    assert kept == rows(whole)
    assert [row["step"] for row in rows(whole) if row["kind"] == "train"] == [2, 4, 6, 8, 10, 12]


def test_run_that_is_killed_goes_on_from_the_last_checkpoint(config, tmp_path):
    whole = train(config, tmp_path / "whole", progress=False)
    with before_step(killed, 8), pytest.raises(SystemExit):
        train(config, tmp_path / "killed", progress=False)
    run = Run.open(tmp_path / "killed")
    assert run.load().step == 6
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "kind": "tr')  # a row cut short
    assert max(row["step"] for row in rows_until_broken(run)) == 8
    train(config, tmp_path / "killed", resume=True, progress=False)
    assert same(run.load().weights, whole.load().weights)
    assert rows(run) == rows(whole)


def rows_until_broken(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()[:-1]]


def test_same_seed_same_weights_and_another_seed_others(config, tmp_path):
    runs = [
        train(set_training(config, steps=3, seed=seed), tmp_path / name, progress=False)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (run.load().weights for run in runs)
    assert same(a, b)
    assert not same(a, c)


def test_covariance_head_is_frozen_in_the_mean_only_phase_and_learns_after_it(config, tmp_path):
    run = train(set_training(config, keep=10), tmp_path / "run", progress=False)
    start, frozen, after = (run.load(step).weights for step in (0, 3, 12))
    for name in ("head.factor.weight", "head.factor.bias"):
        assert torch.equal(start[name], frozen[name])
        assert not torch.equal(start[name], after[name])
    assert not torch.equal(start["head.mean.weight"], frozen["head.mean.weight"])
    entropy = {row["step"]: row["entropy"] for row in rows(run) if row["kind"] == "train"}
    assert entropy[2] == entropy[4] != entropy[6]


def test_mean_only_phase_can_be_left_out(config, tmp_path):
    run = train(set_training(config, steps=3, mean_only_steps=0, keep=9), tmp_path / "run", progress=False)
    assert not torch.equal(run.load(0).weights["head.factor.weight"], run.load(3).weights["head.factor.weight"])


@pytest.mark.parametrize(
    ("model", "objective"),
    [({"fixed_diagonal": False}, {}), ({}, {"entropy_constraint": False}), ({}, {"kl_slack": None, "beta": 0.5})],
    ids=["learned diagonal", "no entropy constraint", "beta"],
)
def test_ablations_train(config, tmp_path, model, objective):
    training = {"steps": 6, "mean_only_steps": 2, "clip": 1.0, "decay": 0.5}
    config = config.replace(model=model, objective=objective, training=training)
    run = train(config, tmp_path / "run", progress=False)
    assert all(torch.isfinite(value).all() for value in run.load().weights.values())


def test_step_size_goes_down_along_a_cosine(config):
    t = set_training(config, steps=100, decay=0.5).training
    sizes = [loop._step_size(step, t) for step in range(100)]
    assert sizes[:51] == [1.0] * 51
    assert sizes[75] == pytest.approx(0.5)
    assert 0 < sizes[99] < 0.01


# --- The folder ---------------------------------------------------------------------------------------------


def test_folder_holds_what_it_should(config, tmp_path):
    run = train(config, tmp_path / "run", progress=False)
    assert run.config == config
    assert run.steps() == [9, 12]  # the newest two
    names = sorted(path.name for path in (run.checkpoints / "step_00000012").iterdir())
    assert names == ["checkpoint.json", "state.pt", "weights.safetensors"]
    assert not [path for path in run.folder.rglob("*") if path.name.startswith(".")]
    x = load(config.data).first("validation", 4)
    model = run.model()
    assert not model.training
    assert model.decode(model.encode(x).loc).batch_shape == (4,)
    new = VAE(config)
    for name, weight in model.state_dict().items():
        assert weight.stride() == new.state_dict()[name].stride(), f"{name} lies as in a network that is trained"
    assert {row["kind"] for row in rows(run)} == {"train", "validation"}
    assert {"neighbour_correlation", "deviation", "log_prob"} <= rows(run)[-1].keys()


def test_loading_a_run_imports_no_compiler(config, tmp_path):
    """Drawing or laying out weights on the device `meta` would: 0.5 to 1.4 seconds of every command."""
    run = train(set_training(config, steps=1), tmp_path / "run", progress=False)
    code = (
        "import sys; from sosvae import Run; Run.open(sys.argv[1]).model();"
        "assert not {'torch._dynamo', 'torch.fx.experimental.symbolic_shapes', 'sympy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(run.folder)], check=True)


@pytest.mark.parametrize("where", ["weights", "state", "rename"])
def test_kill_while_saving_leaves_the_last_whole_checkpoint(config, tmp_path, monkeypatch, where):
    run = train(set_training(config, steps=3), tmp_path / "run", progress=False)
    model = run.model()
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(safetensors.torch, "save_file", killed)
        elif where == "state":
            patch.setattr(run_module.torch, "save", killed)
        else:
            patch.setattr(run_module.Path, "rename", killed)
        with pytest.raises(SystemExit):
            run.save(config, 5, model, {"step": 5})
    assert run.load().step == 3
    run.save(config, 5, model, {"step": 5})
    run.discard(1)
    assert run.steps() == [5]


def test_starting_over_a_run_or_resuming_none_is_an_error(config, tmp_path):
    train(set_training(config, steps=1), tmp_path / "run", progress=False)
    with pytest.raises(FileExistsError, match="--resume"):
        train(config, tmp_path / "run", progress=False)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        train(config, tmp_path / "none", resume=True, progress=False)
    run = Run.create(tmp_path / "empty", config)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(config, tmp_path / "empty", resume=True, progress=False)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7, only of \[0, 1\]"):
        Run.open(tmp_path / "run").load(7)
    assert run.steps() == []


def test_resuming_with_another_architecture_names_the_fields(config, tmp_path):
    train(set_training(config, steps=1), tmp_path / "run", progress=False)
    other = config.replace(model={"rank": 5, "latents": 4})
    with pytest.raises(ValueError, match=r"model\.rank: 2, 5; model\.latents: 3, 4"):
        train(other, tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ValueError, match=r"training\.lr: 0\.01, 0\.5"):
        train(set_training(config, lr=0.5), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ValueError, match=r"training\.decay.*|training\.steps"):
        train(set_training(config, decay=0.5), tmp_path / "run", resume=True, progress=False)
    run = train(set_training(config, steps=2, log_every=1), tmp_path / "run", resume=True, progress=False)
    assert run.config.training.log_every == 1


def test_configuration_of_another_version_is_an_error(config, tmp_path):
    run = Run.create(tmp_path / "run", config)
    run.write_json("config.json", {"model": {"colour": "blue"}})
    with pytest.raises(ValueError, match=r"model\.colour"):
        _ = run.config


def test_batch_larger_than_the_data_is_an_error(config, tmp_path):
    with pytest.raises(ValueError, match="batch of 1000"):
        train(set_training(config, batch=1000), tmp_path / "run", progress=False)


# --- Losses that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["log_prob", "kl", "entropy"])
def test_non_finite_terms_stop_the_run_after_the_limit_and_are_named(config, tmp_path, monkeypatch, term):
    original = loop.evaluate_terms

    def broken(vae, x, *args):
        terms, p = original(vae, x, *args)
        if vae.training and len(seen) >= 4:
            terms = terms._replace(**{term: getattr(terms, term) * float("nan")})
        if vae.training:
            seen.append(1)
        return terms, p

    seen: list[int] = []
    monkeypatch.setattr(loop, "evaluate_terms", broken)
    with pytest.raises(NonFiniteError, match=rf"3 steps .* allowed are 2; .* first was {term}\."):
        train(set_training(config, skip_limit=2), tmp_path / "run", progress=False)
    run = Run.open(tmp_path / "run")
    checkpoint = run.load()
    assert checkpoint.step == 6
    assert all(torch.isfinite(value).all() for value in checkpoint.weights.values())


def test_skipped_step_moves_nothing_and_training_goes_on(config, tmp_path, monkeypatch):
    original = loop.evaluate_terms
    seen: list[int] = []

    def broken(vae, x, *args):
        if vae.training:
            seen.append(1)
            if len(seen) == 3:
                x = x * float("nan")  # goes through batch norm into its running statistics
        return original(vae, x, *args)

    monkeypatch.setattr(loop, "evaluate_terms", broken)
    run = train(set_training(config, skip_limit=1, save_every=1, keep=20), tmp_path / "run", progress=False)
    before, after, end = run.load(2), run.load(3), run.load(12)
    assert same(before.weights, after.weights)
    assert same(before.state["multipliers"], after.state["multipliers"])
    assert (after.state["skipped"], end.step) == (1, 12)
    assert all(torch.isfinite(value).all() for value in end.weights.values())


def test_non_finite_gradients_are_named():
    one, inf = torch.ones(1), torch.tensor(float("inf"))
    terms = loop.Terms(one, one, one)
    assert loop._fault(terms, one[0], one[0]) is None
    assert loop._fault(terms, one[0], inf) == "the gradient"
    assert loop._fault(terms, inf, one[0]) == "the loss"


# --- Ctrl-C -------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_says_how_to_resume_and_loses_nothing(config, tmp_path, capsys):
    whole = train(config, tmp_path / "whole", progress=False)
    before = signal.getsignal(signal.SIGINT)
    with before_step(signalled(signal.SIGINT), 7):
        run = train(config, tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert run.load().step == 8
    assert f"sosvae train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    train(config, tmp_path / "run", resume=True, progress=False)
    assert same(run.load().weights, whole.load().weights)
    assert rows(run) == rows(whole)


def test_second_ctrl_c_stops_at_once(config, tmp_path):
    interrupt = signalled(signal.SIGINT)
    with before_step(lambda: (interrupt(), interrupt())), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").load().step == 0


def test_training_outside_the_main_thread_leaves_signals_alone(config, tmp_path):
    worker = threading.Thread(
        target=train, args=(set_training(config, steps=1), tmp_path / "run"), kwargs={"progress": False}
    )
    worker.start()
    worker.join()
    assert Run.open(tmp_path / "run").load().step == 1
