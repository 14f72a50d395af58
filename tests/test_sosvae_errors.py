"""What is given to public functions and is not what they take: the error names the argument and what was expected."""

import pytest
import torch

from lowrank_mvn import LowRankMultivariateNormal
from sosvae import VAE, Config, DataConfig, ModelConfig, condition, interpolate, scale_components, to_dict, train


@pytest.fixture
def p():
    return LowRankMultivariateNormal(torch.zeros(8), torch.ones(8, 4), torch.ones(8))


@pytest.mark.parametrize("x", [None, [1.0], 3, torch.zeros(1, 1, 16, 16, dtype=torch.uint8)])
def test_what_is_no_tensor_of_floats_is_named(x):
    vae = VAE(Config(data=DataConfig(height=16, width=16), model=ModelConfig(width=0.07, depth=1)))
    for function, name in ((vae.encode, "x"), (vae.decode, "z")):
        with pytest.raises(TypeError, match=rf"^{name} is .*, expected a tensor of floating-point numbers"):
            function(x)


def test_what_is_no_tensor_of_noise_or_pixels_is_named(p):
    noise = torch.zeros(4)
    for call, name in (
        (lambda: interpolate(p, [1.0], noise, noise, 3), "start"),
        (lambda: interpolate(p, noise, noise, None, 3), "omega_d"),
        (lambda: scale_components(p, [1.0]), "factors"),
        (lambda: condition(p, [[1.0]], noise), "edited"),
        (lambda: condition(p, noise, None), "mask"),
    ):
        with pytest.raises(TypeError, match=f"{name} is .*, expected a tensor"):
            call()


def test_sections_of_another_type_are_named():
    with pytest.raises(ValueError, match="model is 3, expected ModelConfig"):
        Config(model=3)
    for function in (to_dict, VAE, lambda config: train(config, "nowhere")):
        with pytest.raises(TypeError, match=r"config is \{\}, expected a Config"):
            function({})
