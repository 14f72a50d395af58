"""What saves memory in training leaves the gradient as it is: micro-batches exactly, bfloat16 within its rounding."""

import itertools

import pytest
import torch
from sosvae_cases import faces, rows, set_training
from torch import nn

from sosvae import VAE, Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig, beta_vae, train
from sosvae.models.layers import Spread
from sosvae.objective import Constraints, evaluate_terms
from sosvae.training import loop

BF16 = 2.0**-8  # unit roundoff: 8 significant bits


def small(head="structured", model=None, **training) -> Config:
    config = Config(
        data=DataConfig(height=17, width=19, channels=3),
        model=ModelConfig(**({"rank": 3, "latents": 4, "width": 0.125, "depth": 1, "diagonal": 1e-2} | (model or {}))),
        objective=ObjectiveConfig(kl_slack=2.0, nats_per_rank=1.5),
        training=TrainingConfig(**({"batch": 8, "mean_only_steps": 0, "device": "cpu"} | training)),
    )
    return config if head == "structured" else beta_vae(config)


def started(config) -> VAE:
    """A network whose covariance and statistics are not at their start."""
    torch.manual_seed(0)
    vae = VAE(config)
    for name, p in vae.head.named_parameters():
        if name.startswith("factor"):
            torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        for _ in range(20):
            evaluate_terms(vae, images(8))
    return vae


def images(number: int) -> torch.Tensor:
    return torch.rand(number, 3, 17, 19, generator=torch.Generator().manual_seed(1))


def gradients(vae, config, mean_only=False, constraints=None):
    """Terms, loss, and the gradient of every parameter, of one step's images."""
    dtype = next(vae.parameters()).dtype
    torch.manual_seed(2)
    vae.zero_grad()
    x = images(config.training.batch).to(dtype)
    terms, loss = loop.differentiate(vae, x, constraints or Constraints.of(config), config, mean_only)
    return terms, loss, {name: p.grad for name, p in vae.named_parameters() if p.grad is not None}


# --- Accumulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(("head", "mean_only"), [("structured", False), ("structured", True), ("pixelwise", False)])
def test_gradient_of_micro_batches_is_that_of_the_batch(head, mean_only, parts):
    # Batch norm by its running statistics: those of a part are what sets micro-batches apart.
    config = small(head)
    vae = started(config).double().eval()
    states = [Constraints.of(config.replace(objective={"multiplier_lr": 0.5})) for _ in range(2)]
    for state, (name, start) in itertools.product(states, (("kl", 0.7), ("entropy", 0.2))):
        state.multipliers[name] = torch.tensor(start)
    accumulated = set_training(config, accumulate=parts)
    whole_terms, whole_loss, whole = gradients(vae, config, mean_only, states[0])
    whole = {name: g.clone() for name, g in whole.items()}
    terms, loss, grads = gradients(vae, accumulated, mean_only, states[1])
    for name in terms._fields:
        torch.testing.assert_close(getattr(terms, name), getattr(whole_terms, name), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    assert grads.keys() == whole.keys()
    for name, g in grads.items():
        assert (g - whole[name]).norm() <= 1e-10 * whole[name].norm(), name
    for state, found in zip(states, (whole_terms, terms), strict=True):
        state.ascend(found)
    for name in states[0].limits:
        ours, theirs = (state.multipliers[name] for state in states)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_damping_follows_the_whole_batch(monkeypatch):
    """Without the first pass the coefficient would be that of a part: another gradient."""
    config = small(accumulate=4)
    vae = started(config).double().eval()
    _, _, right = gradients(vae, config)
    right = {name: g.clone() for name, g in right.items()}
    original = loop.objective
    monkeypatch.setattr(loop, "objective", lambda terms, constraints, o, whole: original(terms, constraints, o))
    _, _, wrong = gradients(vae, config)
    name = "posterior.weight"
    assert (wrong[name] - right[name]).norm() > 1e4 * 1e-10 * right[name].norm()  # the tolerance above sees it


def test_first_pass_leaves_batch_statistics_alone():
    config = small(accumulate=2)
    once, twice = started(config), started(config)
    x = images(8)
    torch.manual_seed(2)
    loop.differentiate(twice.train(), x, Constraints.of(config), config, False)
    for part in x.split(4):
        with torch.no_grad():
            evaluate_terms(once.train(), part, noise=torch.zeros(4, 4))
    for (name, ours), theirs in zip(twice.encoder.named_buffers(), once.encoder.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


# --- bfloat16 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["structured", "materialised", "pixelwise"])
def test_bfloat16_stays_within_its_rounding(head):
    config = small(
        *(["pixelwise"] if head == "pixelwise" else []),
        model={"factor": "materialised"} if head == "materialised" else None,
    )
    vae = started(config)
    terms, _, exact = gradients(vae, config)
    exact = {name: g.clone() for name, g in exact.items()}
    rounded_terms, _, rounded = gradients(vae, set_training(config, precision="bfloat16"))
    assert {t.dtype for t in rounded_terms} == {torch.float32}
    assert {p.dtype for p in vae.parameters()} | {g.dtype for g in rounded.values()} == {torch.float32}
    for name in terms._fields:
        a, b = getattr(rounded_terms, name), getattr(terms, name)
        # A value goes through about 20 roundings in the deepest path of encoder and decoder, of either sign.
        assert (a - b).norm() <= 20**0.5 * BF16 * b.norm(), name
    # What rounding does to a gradient is up to the network: the yardstick is the same network in float32 with every
    # layer's output, and on the way back the gradient of it, rounded to bfloat16.
    for layer in (*vae.encoder.modules(), *vae.decoder.modules()):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d) and not isinstance(layer, Spread):
            layer.register_forward_hook(lambda module, args, y: y.bfloat16().float())
    _, _, emulated = gradients(vae, config)
    error, usual, size = (
        torch.cat([g.flatten() for g in vectors]).norm()
        for vectors in (
            [rounded[name] - g for name, g in exact.items()],
            [emulated[name] - g for name, g in exact.items()],
            exact.values(),
        )
    )
    assert 0.5 * BF16 * size <= usual <= 0.3 * size
    assert error <= 2 * usual


def test_bfloat16_takes_features_in_half_precision_and_keeps_half():
    config = small(model={"width": 0.25})
    kept = []
    for c in (config, set_training(config, precision="bfloat16")):
        vae, pieces = started(c), {}
        vae.decoder.register_forward_hook(lambda module, args, features: kept.append(features.dtype))

        def keep(t, pieces=pieces):
            if t.dim() == 4 and t.shape[0] == 8:  # feature maps
                pieces[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=c.training.precision == "bfloat16"),
        ):
            evaluate_terms(vae, images(8))
        kept.append(sum(pieces.values()))
    assert (kept[0], kept[2]) == (torch.float32, torch.bfloat16)
    assert kept[3] < 0.6 * kept[1]


# --- Whole runs ---------------------------------------------------------------------------------------------


WAYS = {
    "accumulate": {"accumulate": 4},
    "bfloat16": {"precision": "bfloat16"},
    "all": {"accumulate": 2, "precision": "bfloat16", "memory_format": "channels_first", "checkpointing": "stages"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def digits(cache, **training) -> Config:
    values = {"steps": 6, "mean_only_steps": 2, "log_every": 1, "evaluate_every": 3, "evaluate_batches": 1}
    images = {"source": "digits", "height": 16, "flip": False}
    return faces(cache).replace(data=images, model={"width": 0.125}, training=values | training)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_equals_the_uninterrupted_one(cache, tmp_path, way):
    config = digits(cache, **WAYS[way])
    whole = train(config, tmp_path / "whole", progress=False).load()
    train(set_training(config, steps=3), tmp_path / "halves", progress=False)
    torch.manual_seed(99)
    halves = train(config, tmp_path / "halves", resume=True, progress=False).load()
    assert halves.step == whole.step == 6
    for name, value in whole.weights.items():
        assert value.dtype != torch.bfloat16
        assert torch.equal(halves.weights[name], value), name
    assert torch.equal(halves.state["rng"], whole.state["rng"])
    other = set_training(config, accumulate=1, precision="float32")
    with pytest.raises(ValueError, match=r"training\.(accumulate|precision)"):
        train(other, tmp_path / "halves", resume=True, progress=False)


@pytest.mark.parametrize("way", ["bfloat16", "all"])
def test_training_goes_down(cache, tmp_path, way):
    run = train(
        digits(cache, steps=40, evaluate_every=40, save_every=40, **WAYS[way]), tmp_path / "run", progress=False
    )
    found = [row["log_prob"] for row in rows(run) if row["kind"] == "train"]
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 100


def test_step_with_one_bad_micro_batch_is_left_out_whole(cache, tmp_path, monkeypatch):
    original, seen = loop.evaluate_terms, []

    def broken(vae, x, *args):
        if vae.training and torch.is_grad_enabled():
            seen.append(1)
            if len(seen) == 4:  # the second of two micro-batches, of the second step
                x = x * float("nan")
        return original(vae, x, *args)

    monkeypatch.setattr(loop, "evaluate_terms", broken)
    config = digits(cache, accumulate=2, steps=3, save_every=1, keep=9, skip_limit=1)
    run = train(config, tmp_path / "run", progress=False)
    before, after, end = run.load(1), run.load(2), run.load(3)
    for name, value in before.weights.items():
        assert torch.equal(after.weights[name], value), name
    assert after.state["skipped"] == 1
    assert all(torch.isfinite(value).all() for value in end.weights.values())
