"""What is seen of training: metrics, bar, TensorBoard; and that what watches ends nothing. Measures of samples."""

import json
import math

import pytest
import torch
from sosvae_cases import faces, rows, same, set_training

from sosvae import VAE, Config, DataConfig, ModelConfig, PixelwiseNormal, neighbour_correlation, quality, train
from sosvae.training.watch import Bar, Board, Metrics, Row


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return faces(tmp_path_factory.mktemp("cache"))


def test_metrics_drop_what_is_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n{"no": 1}\n[]\nnonsense')
    metrics = Metrics(path, last_step=2)
    assert metrics.torn == [3, 4]
    metrics.measured(Row(3, "train", {"kl": 1.0}))
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_bar_shows_terms_throughput_and_time_left(config, tmp_path, capsys):
    train(config, tmp_path / "run")
    shown = capsys.readouterr().err
    for part in ("structured", "log_prob=", "kl=", "entropy=", "nats", "images/s", "12/12", "<"):
        assert part in shown


def test_tensorboard_has_scalars_and_pictures(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(set_training(config, tensorboard=True, steps=6), tmp_path / "run", progress=False)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"train/log_prob", "train/multiplier_kl", "train/images_per_second", "validation/kl"} <= set(
        events.Tags()["scalars"]
    )
    assert len(events.Tags()["images"]) == 2


def test_evaluation_changes_nothing(config, tmp_path):
    runs = [
        train(set_training(config, evaluate_every=every, steps=6), tmp_path / str(every), progress=False)
        for every in (1, 6)
    ]
    assert same(runs[0].load().weights, runs[1].load().weights)


# --- Observers that fail ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(config, tmp_path_factory):
    config = set_training(config, tensorboard=True, steps=4, evaluate_every=4)
    return config, train(config, tmp_path_factory.mktemp("watched"))


@pytest.mark.parametrize("where", ["__init__", "measured", "close"])
@pytest.mark.parametrize("kind", [Metrics, Bar, Board])
def test_observer_that_fails_warns_once_and_changes_nothing(watched, tmp_path, monkeypatch, kind, where):
    config, whole = watched
    close = kind.close

    def fails(self, *args):
        if where == "close":
            close(self)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(kind, where, fails)
        with pytest.warns(UserWarning, match="OSError: no space left; training goes on") as warned:
            run = train(config, tmp_path / "run")
    assert len(warned) == 1
    assert same(run.load().weights, whole.load().weights)
    assert same(run.load().state, whole.load().state)
    if kind is not Metrics or where == "close":
        assert rows(run) == rows(whole)


def test_interrupt_goes_through_observers(config, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    closed, close = [], Metrics.close
    monkeypatch.setattr(Metrics, "measured", interrupted)
    monkeypatch.setattr(Metrics, "close", lambda self: closed.append(close(self)))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", progress=False)
    assert len(closed) == 1


# --- Measures -----------------------------------------------------------------------------------------------


def test_neighbour_correlation_of_known_fields():
    torch.manual_seed(0)
    noise = torch.randn(4000, 1, 1, 3, 8)
    assert neighbour_correlation(noise) == pytest.approx(0.0, abs=0.01)
    smooth = noise[..., :1].expand_as(noise)
    assert neighbour_correlation(smooth) == pytest.approx(1.0)
    assert neighbour_correlation(0.6 * smooth + 0.8 * noise.roll(3, 0)) == pytest.approx(0.36, abs=0.02)
    assert neighbour_correlation(-torch.ones(5, 1, 1, 2, 2) * torch.tensor([1.0, -1.0])) == pytest.approx(-1.0)


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 1, 4, 1), (0, 3, 1, 4, 4)])
def test_images_without_neighbours_are_an_error(shape):
    with pytest.raises(ValueError, match=r"images has shape .* expected \[S, B, channels, H, W\]"):
        neighbour_correlation(torch.zeros(shape))


def test_quality_of_constant_data_is_nan():
    vae = VAE(Config(data=DataConfig(height=16, width=16), model=ModelConfig(width=0.07, depth=1, latents=2))).eval()
    found = quality(vae, 0.0, codes=2, samples=2)
    assert math.isnan(found.deviation)
    assert math.isfinite(found.neighbour_correlation)
    with torch.no_grad():
        vae.head.mean.bias.fill_(3.0)  # whose square rounds: the variance of samples must not be below 0
    vae.decode = lambda z: PixelwiseNormal(torch.full((len(z), 256), 3.3), torch.zeros(()))
    assert quality(vae, 1.0, codes=2, samples=2).deviation == pytest.approx(0, abs=1e-3)
    for counts in ({"codes": 0}, {"samples": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            quality(vae, 1.0, **counts)


def test_quality_is_that_of_the_predicted_distributions(config, tmp_path):
    run = train(set_training(config, steps=1), tmp_path / "run", progress=False)
    vae = run.model()
    with torch.no_grad():
        vae.head.mean.weight.zero_()
        vae.head.factor.weight.zero_()
        vae.head.factor.bias.copy_(torch.tensor([0.3, 0.0]))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    # P is one constant column of 0.3, d is 0.01: every pixel has variance 0.1, neighbours covariance 0.09.
    found = quality(vae, data_deviation=0.5, codes=20, samples=200)
    assert found.neighbour_correlation == pytest.approx(0.9, abs=0.02)
    assert found.deviation == pytest.approx(0.1**0.5 / 0.5, rel=0.05)
    assert torch.equal(torch.get_rng_state(), state)
