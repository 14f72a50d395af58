"""What the tests of `sosvae` share."""

import json

import torch

from sosvae import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig


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
