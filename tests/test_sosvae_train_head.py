"""Heads on a network that stays as it is: runs made of runs, a stranger's module, and a mean that is kept honest."""

import re

import pytest
import torch
from PIL import Image
from sosvae_cases import faces, pictures, rows, same, small
from torch import nn

from sosvae import ModelConfig, Run, StructuredUncertainty, train, train_head
from sosvae.cli import main
from sosvae.models import heads
from sosvae.objective import MOST, Constraints
from sosvae.planning.memory import StepMemory
from sosvae.training import loop
from sosvae.training.head import of_run
from sosvae.training.state import State


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run with independent pixels."""
    folder = tmp_path_factory.mktemp("base")
    config = small(pictures(folder / "in"), folder / "cache").replace(model={"head": "pixelwise"})
    return train(config, folder / "beta", progress=False)


def options(base, **model):
    """Six steps of a head on it."""
    steps = {"steps": 6, "evaluate_every": 3, "save_every": 3, "keep": 9}
    return of_run(base.config, **({"rank": 2} | model)).replace(training=steps)


@pytest.mark.parametrize("head", heads.NAMES)
def test_head_of_any_kind_learns_and_the_network_stays(base, head, tmp_path):
    run = train_head(base, options(base, head=head), tmp_path / "new", progress=False)
    before, after = base.load().weights, run.load().weights
    stays = [name for name in before if not name.startswith("head.") or name.startswith("head.mean.")]
    assert "encoder.1.running_mean" in stays
    assert all(torch.equal(before[name], after[name]) for name in stays)
    start = run.load(0).weights
    moved = {name for name in after if name not in stays and not torch.equal(start[name], after[name])}
    assert {name.split(".")[1] for name in moved} == {name.split(".")[1] for name in after if name not in stays}
    assert run.split.digest == base.split.digest
    assert Run.open(run.folder).config.model.head == head
    assert main(["sample", str(run.folder), "--codes", "2", "--samples", "1"]) == 0
    assert "kl" not in {name for name, value in run.load().state["multipliers"].items() if value}


def test_head_goes_on_bit_for_bit(base, tmp_path):
    config = options(base)
    whole = train_head(base, config, tmp_path / "whole", progress=False)
    train_head(base, config.replace(training={"steps": 3, "decay": 0.0}), tmp_path / "parts", progress=False)
    with pytest.raises(ValueError, match="trained with another configuration"):
        train_head(base, config, tmp_path / "parts", progress=False)
    even = config.replace(training={"decay": 0.0})
    straight = train_head(base, even, tmp_path / "straight", progress=False)
    parts = train_head(base, even, tmp_path / "parts", progress=False)
    assert same(parts.load().weights, straight.load().weights)
    # By `train --resume` too, which changes the network as little.
    longer = config.replace(training={"decay": 0.0, "steps": 8})
    resumed = train(longer, tmp_path / "parts", resume=True, progress=False)
    assert torch.equal(resumed.load().weights["encoder.0.weight"], whole.load().weights["encoder.0.weight"])


def test_nothing_is_kept_for_a_backward_pass_through_the_network(base):
    """What autograd saves is of the head: the memory of a step is that of a forward pass, the head's own aside."""

    def saved(config, frozen):
        state, total = State(config, torch.device("cpu")), 0
        state.model.train().freeze(frozen)

        def count(t):
            nonlocal total
            total += t.nbytes
            return t

        x = torch.rand(4, *config.image_shape)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            features = state.model.decoder(state.model.encode(x).rsample())
        assert features.requires_grad != frozen
        return total

    config = options(base)
    assert saved(config, True) == 0
    assert saved(config, False) > 0
    trained = config.replace(objective={"mean": "free"})
    assert StepMemory(config).peak(64, 4).network < 0.5 * StepMemory(trained).peak(64, 4).network


def test_command_makes_a_run_and_goes_on(base, tmp_path, capsys):
    args = ["train-head", str(base.folder), "--model.rank", "2", "--training.steps", "3", "--quiet"]
    folder = base.folder.with_name("beta-global-local")
    assert main(args) == 0
    assert f"{folder}: checkpoint of step 3 of 3" in capsys.readouterr().out
    assert main(args) == 0
    config = Run.open(folder).config
    assert (config.objective.mean, config.training.dequantise, config.model.latents) == ("frozen", True, 2)
    with pytest.raises(SystemExit):
        main(["train-head", "--help"])
    assert "--model.neighbourhood" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no run was given, expected the folder of a finished one first"),
        (["nowhere"], "nowhere is not the folder of a run"),
        (["{run}", "--model.latents", "5"], r"model.latents is 5, expected 2, as of .*: its network stays"),
        (["{run}", "--data.height", "32"], r"data.height is 32, expected 16"),
        (["{run}", "--objective.mean", "free"], "objective.mean is 'free' and training.mean_only_steps is 0, expected"),
        (["{run}", "--step", "99"], "has no checkpoint of step 99"),
    ],
)
def test_what_cannot_be_is_one_line(base, args, message, tmp_path, capsys):
    args = [part.format(run=base.folder) for part in args] + (["--folder", str(tmp_path / "x")] if args else [])
    assert main(["train-head", *args]) == 1
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert shown.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_data_with_one_value_everywhere(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(8):
        Image.new("L", (16, 16)).save(tmp_path / "in" / f"{i}.png")
    with pytest.warns(UserWarning, match="deviation: no finite number"):
        run = train(small(tmp_path / "in", tmp_path / "cache"), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="training images have one value everywhere, 0 of 255"):
        train_head(run, options(run), tmp_path / "new", progress=False)


# --- A stranger's module -------------------------------------------------------------------------------------------


class Stranger(nn.Module):
    """A decoder with batch norm and dropout, of codes [B, 3]."""

    def __init__(self, channels=1):
        super().__init__()
        self.spread = nn.Linear(3, 6 * 9 * 8)
        self.norm, self.drop, self.last = nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Conv2d(6, channels, 1)

    def forward(self, z):
        features = self.drop(self.norm(self.spread(z).unflatten(1, (6, 9, 8))).relu())
        return self.last(features).sigmoid(), features


def images_of(module, count, seed=0):
    """Codes, and images that are smooth off the module's mean."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 3, generator=generator)
    with torch.no_grad():
        loc = module.eval()(z)[0]
    coarse = torch.randn(count, loc.shape[1], 3, 3, generator=generator)
    return z, loc + 0.1 * nn.functional.interpolate(coarse, size=loc.shape[2:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize("head", heads.NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_stranger_gets_a_distribution(head, channels):
    module = Stranger(channels).train()
    module.drop.eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    z, x = images_of(module, 64)
    module.train()
    module.drop.eval()
    config = ModelConfig(head=head, rank=2, diagonal=1e-2, fixed_diagonal=False)
    uncertainty = StructuredUncertainty(module, z[:1], config)
    found = uncertainty.fit([(z, x)], steps=40, lr=1e-2, dequantise=False)
    assert len(found) == 40
    assert found[-1] > found[0]
    assert same(dict(module.state_dict()), before)
    assert (module.training, module.drop.training, module.norm.training) == (True, False, True)
    assert all(weight.grad is None for weight in module.parameters())
    p = uncertainty(z[:2])
    torch.testing.assert_close(p.loc, module.eval()(z[:2])[0].flatten(1))
    assert uncertainty.unflatten(p.rsample((5,))).shape == (5, 2, channels, 9, 8)


def test_what_is_smooth_is_learned():
    module = Stranger()
    z, x = images_of(module, 64)
    test_z, test_x = images_of(module, 64, seed=1)

    def density(head):
        uncertainty = StructuredUncertainty(module, z[:1], ModelConfig(head=head, rank=4))
        uncertainty.fit([(z, x)], steps=150, lr=1e-2, dequantise=False)
        return float(uncertainty(test_z).log_prob(test_x.flatten(1)).detach().mean())

    assert density("global-local") > density("pixelwise") + 20


def test_modules_without_features_and_images_that_do_not_fit():
    module, (z, x) = Stranger(), images_of(Stranger(), 4)
    for wrong, message in (
        (lambda z: module(z)[0], r"module returned one tensor of shape \[4, 1, 9, 8\], expected a pair of tensors"),
        (lambda z: (*module(z), z), r"module returned a tuple of 3 \(Tensor, Tensor, Tensor\), expected a pair"),
        (lambda z: {"mean": module(z)[0]}, "module returned a dict, expected a pair of tensors"),
    ):
        with pytest.raises(TypeError, match=message):
            StructuredUncertainty(wrong, z)
    with pytest.raises(ValueError, match=r"a mean of shape \[4, 1, 9, 8\] and features of shape \[4, 3\], expected"):
        StructuredUncertainty(lambda z: (module(z)[0], z), z)
    row = lambda z: tuple(t[:, :, :2] for t in module(z))  # noqa: E731
    with pytest.raises(
        ValueError, match=r"neighbourhood \(5, 5\) has neighbours that no pixel of an image of \[2, 8\]"
    ):
        StructuredUncertainty(row, z, ModelConfig(head="precision", neighbourhood=5))
    uncertainty = StructuredUncertainty(module, z)
    for batches, message in (
        ([(z, x[..., 1:])], r"images have shape \[4, 1, 9, 7\], expected \[4, 1, 9, 8\], as the module's mean"),
        ([(z, x[:3])], r"images have shape \[3, 1, 9, 8\], expected \[4, 1, 9, 8\]"),
        ([], "batches is empty"),
        ([(z, torch.ones_like(x))], "images have one value everywhere, 1: expected images that vary"),
    ):
        with pytest.raises(ValueError, match=message):
            uncertainty.fit(batches, steps=3)
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        uncertainty.fit([(z, x)], steps=0)


# --- The mean of a network that is trained all at once ------------------------------------------------------------


def test_frozen_after_the_mean_only_steps(tmp_path):
    config = faces(tmp_path / "cache").replace(model={"head": "global-local"}, objective={"mean": "frozen"})
    run = train(config.replace(training={"keep": 9}), tmp_path / "run", progress=False)
    weights = {step: run.load(step).weights for step in (3, 6, 12)}
    assert not torch.equal(weights[3]["decoder.0.weight"], weights[6]["decoder.0.weight"])
    for name in ("decoder.0.weight", "head.mean.weight", "encoder.1.running_mean"):
        assert torch.equal(weights[6][name], weights[12][name])
    assert not torch.equal(weights[6]["head.factor.weight"], weights[12]["head.factor.weight"])
    train_rows = [row for row in rows(run) if row["kind"] == "train"]
    assert train_rows[-1]["multiplier_kl"] == train_rows[1]["multiplier_kl"]


def test_held_mean_has_a_level_and_a_bounded_multiplier():
    constraints = Constraints({}, damping=2.0, holds_mean=True)
    m = constraints.multipliers
    error, loss = torch.tensor(8.0, requires_grad=True), torch.tensor(1.0)
    assert constraints.held(loss, error, 100) == 1  # there is no level yet
    for _ in range(400):
        constraints.notice(torch.tensor(4.0), mean_only=True)
    assert float(m["mean_level"]) == pytest.approx(4)
    constraints.notice(torch.tensor(4.1), mean_only=False)
    assert float(m["mean"]) == 0  # within the room above the level
    assert constraints.held(loss, error, 100) == 1
    for _ in range(20):
        constraints.notice(torch.tensor(8.0), mean_only=False)
    v = float(m["mean_error"]) / 4 - 1.05
    assert v > 0.2
    held = constraints.held(loss, error, 100)
    assert held.item() == pytest.approx(1 + (float(m["mean"]) + 2 * v) * 50 * 8 / 4)
    held.backward()
    assert error.grad.item() == pytest.approx((float(m["mean"]) + 2 * v) * 50 / 4)
    for _ in range(1000):
        constraints.notice(torch.tensor(80.0), mean_only=False)
    assert float(m["mean"]) == MOST
    for _ in range(1000):
        constraints.notice(torch.tensor(1.0), mean_only=False)
    assert float(m["mean"]) == 0


def test_held_mean_goes_on_bit_for_bit(tmp_path):
    config = faces(tmp_path / "cache").replace(
        model={"head": "global-local"}, objective={"mean": "held"}, training={"accumulate": 2}
    )
    whole = train(config, tmp_path / "whole", progress=False)
    train(config.replace(training={"steps": 6}), tmp_path / "parts", progress=False)
    parts = train(config, tmp_path / "parts", resume=True, progress=False)
    assert same(parts.load().weights, whole.load().weights)
    multipliers = whole.load().state["multipliers"]
    assert multipliers.keys() == {"kl", "mean", "mean_level", "mean_error"}
    assert multipliers["mean_level"] > 0
    with pytest.raises(ValueError, match=r"objective\.mean is 'held' and training\.mean_only_steps is 0"):
        config.replace(training={"mean_only_steps": 0})


def test_noise_of_dequantisation_is_of_one_grey_level(tmp_path, monkeypatch):
    config = faces(tmp_path / "cache").replace(training={"dequantise": True})
    seen, differentiate = [], loop.differentiate
    monkeypatch.setattr(loop, "differentiate", lambda model, x, *rest: seen.append(x) or differentiate(model, x, *rest))
    loop.train_step(State(config, torch.device("cpu")), torch.full((4, 1, 17, 16), 0.5), config)
    off = (seen[0] - 0.5) * 255
    assert off.abs().max() <= 0.5 + 1e-4
    assert float(off.var()) == pytest.approx(1 / 12, rel=0.1)
