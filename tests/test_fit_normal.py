"""One normal over a data set: closed form, EM and gradient against what is known, and the command."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from data_cases import write
from PIL import Image

from sosvae.cli import main
from sosvae.evaluation import bits, measure, normal

SHAPE = (1, 8, 9)
N, R = 72, 3


def drawn(count=400, seed=0, noise=0.05):
    """Bytes of a low-rank normal with a d for each pixel."""
    random = np.random.default_rng(seed)
    P = np.random.default_rng(99).normal(size=(N, R)) * 0.08
    d = noise * (0.3 + np.random.default_rng(98).random(N))
    x = 0.5 + random.normal(size=(count, R)) @ P.T + random.normal(size=(count, N)) * d
    return np.clip(np.round(255 * x), 0, 255).astype(np.uint8).reshape(count, *SHAPE)


@pytest.fixture(scope="module")
def images():
    return normal.Images(drawn())


def dense(fit):
    Sigma = fit.factor @ fit.factor.T + torch.diag(fit.diag.expand(N))
    return torch.distributions.MultivariateNormal(fit.loc, Sigma)


def test_log_density_is_the_dense_one(images):
    fit = normal.of_pca(images, R)
    expected = dense(fit).log_prob(torch.cat(list(images.blocks())).double()).mean()
    assert fit.log_prob(images) == pytest.approx(float(expected), abs=1e-8)


def test_closed_form_is_the_textbook_s(images):
    x = torch.cat(list(images.blocks())).double()
    S = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    values = torch.linalg.eigvalsh(S).flip(0)
    d = values[R:].mean()
    best = -0.5 * (N * math.log(2 * math.pi) + values[:R].log().sum() + (N - R) * d.log() + N)
    fit = normal.in_closed_form(images, R)
    assert float(fit.diag) == pytest.approx(float(d), rel=1e-10)
    assert fit.log_prob(images) == pytest.approx(float(best), abs=1e-8)


def test_em_with_one_d_reaches_the_closed_form_and_never_falls(images):
    told = []
    fit = normal.by_em(images, R, per_pixel=False, tolerance=1e-6, advanced=lambda i, value: told.append(value))
    assert all(b > a - 1e-9 for a, b in itertools.pairwise(told))
    assert normal.in_closed_form(images, R).log_prob(images) - fit.log_prob(images) == pytest.approx(0, abs=1e-3)


def test_em_with_d_per_pixel_is_scikit_learn_s_factor_analysis(images):
    from sklearn.decomposition import FactorAnalysis

    fit = normal.by_em(images, R, per_pixel=True, floor=1e-6, tolerance=1e-7)
    x = torch.cat(list(images.blocks())).double().numpy()
    expected = FactorAnalysis(R, svd_method="lapack", tol=1e-8, max_iter=5000).fit(x)
    assert fit.log_prob(images) == pytest.approx(expected.score(x), abs=1e-2)
    assert fit.log_prob(images) > normal.in_closed_form(images, R).log_prob(images) + 1


def test_floor_holds_where_pixels_never_change():
    bytes_ = drawn()
    bytes_[:, :, :2] = 0
    told = []
    fit = normal.by_em(
        normal.Images(bytes_), R, per_pixel=True, floor=1e-4, advanced=lambda i, value: told.append(value)
    )
    assert all(b > a - 1e-9 for a, b in itertools.pairwise(told))
    assert (fit.diag[:18] == 1e-4).all()
    assert (fit.diag[18:] > 1e-4).all()


@pytest.mark.parametrize("per_pixel", [False, True])
def test_gradient_comes_close_to_em(images, per_pixel):
    fit = normal.by_gradient(images, R, per_pixel=per_pixel, steps=300, iterations=300)
    best = normal.by_em(images, R, per_pixel=per_pixel, tolerance=1e-6).log_prob(images)
    assert -1e-2 < best - fit.log_prob(images) < 0.1


@pytest.mark.parametrize("kept", [True, False])
def test_images_that_do_not_fit_into_memory_give_the_same(images, monkeypatch, kept):
    monkeypatch.setattr(normal, "AT_ONCE", 64)
    if not kept:
        monkeypatch.setattr(normal, "KEPT", 0)
    streamed = normal.Images(drawn())
    assert (streamed._kept is None) == (not kept)
    for a, b in zip(images.moments(), streamed.moments(), strict=True):
        torch.testing.assert_close(a, b)
    one, other = (normal.by_em(each, R, per_pixel=True, iterations=20) for each in (images, streamed))
    torch.testing.assert_close(one.diag, other.diag)
    one, other = (normal.by_gradient(each, R, per_pixel=True, steps=5, iterations=2) for each in (images, streamed))
    torch.testing.assert_close(one.diag, other.diag)
    assert normal.of_pca(streamed, R).log_prob(images) > normal.of_pca(images, R).log_prob(images) - 2


def test_a_normal_is_measured_as_models_are(images):
    fit = normal.by_em(images, R, per_pixel=True)
    found = measure.measure(normal.Constant(fit, SHAPE), drawn(64, seed=1), measure.Settings(codes=2, samples=4))
    x = bits.dequantised(drawn(64, seed=1), 0).flatten(1).double()
    expected = float(bits.per_dimension(dense(fit).log_prob(x).mean(), N))
    assert found["bits"] == pytest.approx(expected, abs=1e-4)
    assert found["bits_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert found["squares"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rank", [0, -1, 9, 400])
def test_ranks_that_leave_no_variance_are_named(rank):
    few = normal.Images(drawn(10))
    for fit in (
        lambda: normal.in_closed_form(few, rank),
        lambda: normal.by_em(few, rank, per_pixel=True),
        lambda: normal.by_gradient(few, rank, per_pixel=True),
        lambda: normal.of_pca(few, rank),
    ):
        with pytest.raises(ValueError, match=f"rank is {rank}, expected 1 to 8 for 10 training images of 72 values"):
            fit()


def test_images_without_a_variance_are_named():
    with pytest.raises(ValueError, match="all 5 images are the same"):
        normal.Images(np.full((5, *SHAPE), 7, np.uint8))
    with pytest.raises(ValueError, match="there are 1 images, expected at least 2"):
        normal.Images(drawn(1))


# --- The command ------------------------------------------------------------------------------------------------

SMALL = ["--quiet", "--data.height=16", "--data.width=16", "--data.validation=0.4", "--steps=20", "--iterations=30"]


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 256, (16, 16)).astype(np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


def test_command_prints_gaps_and_writes_numbers_parameters_and_sheet(folder, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["fit-normal", str(folder), *SMALL, "--rank=2", f"--data.cache={tmp_path / 'cache'}", f"--out={out}"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "normal.json").read_text())
    assert list(found["fits"]) == [
        "one d, closed form (PPCA)",
        "one d, EM",
        "one d, gradient",
        "d per pixel, EM",
        "d per pixel, gradient",
        "PCA of scikit-learn",
    ]
    for name, row in found["fits"].items():
        assert name in printed
        assert f"{row['log_prob']:.2f}" in printed
        assert math.isfinite(row["test_log_prob"])
    assert found["fits"]["one d, gradient"]["gap"] > 0
    assert found["fits"]["d per pixel, gradient"]["gap_to"] == "d per pixel, EM"
    with Image.open(out / "figures" / "normal.png") as picture:
        assert min(picture.size) > 300
    from safetensors import safe_open

    with safe_open(out / "normal.safetensors", "pt") as file:
        assert file.get_tensor("one d, EM/factor").shape == (256, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank=30"], "rank is 30, expected 1 to"),
        (["--rank=0"], "rank is 0, expected at least 1"),
        (["--floor=-1"], "floor is -1.0, expected a variance"),
        (["--steps=0"], "steps is 0"),
    ],
)
def test_command_has_one_error_for_what_cannot_be(folder, tmp_path, capsys, options, message):
    args = ["fit-normal", str(folder), *SMALL, *options, f"--data.cache={tmp_path / 'cache'}"]
    if options == ["--rank=30"]:
        assert main([*args, f"--out={tmp_path / 'out'}"]) == 1
    else:  # what no data are needed to know
        with pytest.raises(SystemExit):
            main([*args, f"--out={tmp_path / 'out'}"])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_command_names_data_without_variance_and_data_that_are_not_there(tmp_path, capsys):
    for i in range(8):
        write(tmp_path / "same" / f"{i}.png", 7)
    args = [*SMALL, "--rank=1", f"--data.cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
    assert main(["fit-normal", str(tmp_path / "same"), *args]) == 1
    assert "images are the same" in capsys.readouterr().err
    assert main(["fit-normal", str(tmp_path / "none"), *args]) == 1
    assert "unknown source" in capsys.readouterr().err
