"""What the tests of `sosvae` share."""

import json
import os
from contextlib import contextmanager

import pytest
import torch

from sosvae import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from sosvae.training import loop


def faces(cache) -> Config:
    """Twelve steps of a tiny network on the faces."""
    return Config(
        data=DataConfig(source="faces", height=17, width=16, cache=str(cache), flip=True),
        model=ModelConfig(rank=2, latents=3, width=0.07, depth=1, upsampling="bilinear", diagonal=1e-2),
        objective=ObjectiveConfig(kl_slack=5.0, nats_per_rank=3.0),
        training=TrainingConfig(
            steps=12,
            mean_only_steps=4,
            batch=8,
            lr=1e-2,
            log_every=2,
            evaluate_every=6,
            evaluate_batches=2,
            save_every=3,
            tensorboard=False,
            device="cpu",
        ),
    )


def pictures(folder, count=8):
    """A folder of small images: a gradient each, and a name that says which."""
    from data_cases import write

    for i in range(count):
        write(folder / f"{i:02d}.png", 20 * i, size=(16, 16))
    return folder


def small(folder, cache, **training) -> Config:
    """Four steps of the smallest network on the pictures of a folder."""
    values = {"steps": 4, "mean_only_steps": 1, "batch": 4, "evaluate_batches": 1, "evaluate_every": 2, "save_every": 2}
    return faces(cache).replace(
        data={"source": f"folder:{folder}", "height": 16, "width": 16, "validation": 0.25},
        model={"rank": 1, "latents": 2},
        training=values | {"log_every": 1} | training,
    )


def options(config, folder):
    """The command line of `small`."""
    data, model = config.data, config.model
    return [
        *("--folder", str(folder), "--quiet", f"--data.source={data.source}", f"--data.cache={data.cache}"),
        *("--data.height=16", "--data.width=16", "--data.validation=0.25", f"--model.width={model.width}"),
        *("--model.rank=1", "--model.latents=2", "--model.depth=1", "--training.batch=4", "--training.device=cpu"),
        *("--training.steps=4", "--training.evaluate-batches=1", "--training.no-tensorboard"),
    ]


def killed(*args, **kwargs):
    raise SystemExit


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


@contextmanager
def before_step(act, step=None):
    """Calls `act` before the step of this number, or before each."""
    original = loop.train_step

    def acting(state, *args):
        if step in (None, state.step):
            act()
        return original(state, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", acting)
        yield


def set_training(config, **values):
    return config.replace(training=values)


def rows(run):
    """Rows of a run's metrics."""
    return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def same(a, b):
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
