"""Configurations by name, and what makes a β-VAE of one."""

from .config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig

__all__ = ["PRESETS", "beside", "beta_vae"]

_FACES = Config(
    data=DataConfig(source="faces", height=48, width=40, channels=1, flip=True, validation=0.2),
    model=ModelConfig(rank=10, latents=32, width=0.25, depth=1, upsampling="bilinear", diagonal=3e-5),
    objective=ObjectiveConfig(kl_slack=20.0, nats_per_rank=5.1),
    training=TrainingConfig(steps=3600, mean_only_steps=1200, batch=16, lr=1e-3),
)

PRESETS: dict[str, tuple[str, Config]] = {
    "faces": ("400 AT&T faces, 48×40 grey, small network: minutes on two cores", _FACES),
    "digits": (
        "5,000 MNIST digits, 28×28: a smoke test (their constant background suits no normal likelihood)",
        _FACES.replace(
            data={"source": "digits", "height": 28, "width": 28, "flip": False},
            model={"diagonal": 1e-3},
            objective={"nats_per_rank": 3.0},
            training={"steps": 1500, "mean_only_steps": 500},
        ),
    ),
    "celeba-64-grey": (
        "CelebA at 64×64 grey with the paper's settings; give --data.source celeba:PATH",
        Config(
            data=DataConfig(source="celeba:celeba", height=64, width=64, channels=1),
            objective=ObjectiveConfig(kl_slack=45.0, entropy_slack=-17_630.0),
        ),
    ),
    "celeba": (
        "CelebA at 218×178 in colour with the paper's settings; give --data.source celeba:PATH",
        Config(
            data=DataConfig(source="celeba:celeba", height=218, width=178, channels=3),
            objective=ObjectiveConfig(kl_slack=45.0, entropy_slack=-504_750.0),
        ),
    ),
    "brain": (
        "Axial brain slices at 197×233 with the paper's settings; give --data.source brain:PATH",
        Config(
            data=DataConfig(source="brain:brain", height=197, width=233, channels=1, fit="pad"),
            objective=ObjectiveConfig(kl_slack=15.0, entropy_slack=-198_906.0),
        ),
    ),
}
"""Name → (one line about it, configuration)."""


def beta_vae(config: Config) -> Config:
    """The β-VAE of `config`: independent pixels with learned variances; everything else stays as it is.

    The KL stays under the same constraint (its multiplier is the β, found instead of guessed), and so does
    the mean-only phase. Only the entropy constraint goes: it bounds the low-rank part, which is not there.
    """
    return config.replace(model={"head": "pixelwise"}, objective={"entropy_constraint": False})


def beside(config: Config) -> Config:
    """The β-VAE that heads are fitted to beside `config`: half the steps, for it has no low-rank part to learn.

    Its variances are those of dequantised images and start near what a residual has (6e-3): from a variance of 1e-5
    they are far off for thousands of steps. Training images are moved by up to three pixels, without which a network
    learns the people of a small collection by heart, and no covariance that is learned from what it leaves of them is
    right for others.
    """
    t = config.training
    return beta_vae(config).replace(
        data={"shift": 3},
        model={"diagonal": 6e-3},
        training={
            "steps": max(1, t.steps // 2),
            "mean_only_steps": t.mean_only_steps // 2,
            "decay": 0.5,
            "dequantise": True,
        },
    )
