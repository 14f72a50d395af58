"""The pixel-wise head that is refitted on a network's features."""

import pytest
from sosvae_cases import faces

from sosvae import VAE, load
from sosvae.evaluation import baselines, bits, measure


@pytest.fixture
def model(tmp_path):
    config = faces(tmp_path / "cache")
    return VAE(config).eval(), config, load(config.data)


def test_refitted_head_explains_more_and_leaves_the_network_alone(model):
    vae, config, images = model
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    told = []
    new = baselines.refitted(vae, config, images, steps=60, batch=16, lr=1e-2, advanced=told.append)
    assert told == list(range(1, 61))
    assert all((value == before[name]).all() for name, value in vae.state_dict().items())
    assert new.head is not vae.head
    assert new.encoder is vae.encoder
    x = images.images[images.indices["test"]]
    settings = measure.Settings(codes=2, samples=2)
    old_row, new_row = (measure.measure(each, x, settings) for each in (vae, new))
    assert new_row["bits"] < old_row["bits"]
    assert new_row["bits"] < bits.UNIFORM
    again = baselines.refitted(vae, config, images, steps=60, batch=16, lr=1e-2)
    assert measure.measure(again, x, settings) == new_row
    with pytest.raises(ValueError, match="a batch of 1000 is more than"):
        baselines.refitted(vae, config, images, batch=1000)
