"""Grids, components, strokes and edits: the functions, and the commands on a small run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sosvae_cases import faces

from lowrank_mvn import LowRankMultivariateNormal
from sosvae import PixelwiseNormal, train
from sosvae.cli import main
from sosvae.presets import beta_vae
from sosvae.tools import sheets, strokes

N, R = 12, 3


@pytest.fixture
def p():
    return LowRankMultivariateNormal(torch.rand(1, N), torch.randn(1, N, R), torch.tensor(1e-2))


def test_grid_has_the_four_samples_at_its_corners(p):
    low_rank, corners, omega_d = sheets.drawn(p, 4, "it")
    images = sheets.grid(low_rank, corners, omega_d, 5).reshape(5, 5, N)
    ends = [images[0, 0], images[0, -1], images[-1, 0], images[-1, -1]]
    for omega, image in zip(corners, ends, strict=True):
        expected = p.rsample((1,), noise=(omega[None, None], omega_d[None, None]))[0, 0]
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)
    # Neighbours are alike, and coefficients are as long as those of samples.
    steps = (images[:, 1:] - images[:, :-1]).norm(dim=-1)
    assert steps.max() < (images[0, 0] - images[0, -1]).norm()
    with pytest.raises(ValueError, match="side is 1"):
        sheets.grid(low_rank, corners, omega_d, 1)
    with pytest.raises(ValueError, match=r"corners has shape \[3, 3\], expected \[4, 3\]"):
        sheets.grid(low_rank, corners[:3], omega_d, 4)


def test_components_scale_one_direction_each(p):
    low_rank, omega_p, omega_d = sheets.drawn(p, 1, "it")
    factors = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    images = sheets.components(low_rank, omega_p[0], omega_d, factors, R)
    assert images.shape == (R, 4, N)
    own = p.rsample((1,), noise=(omega_p[:, None], omega_d[None, None]))[0, 0]
    U = torch.linalg.svd(p.cov_factor[0], full_matrices=False).U
    for k in range(R):
        torch.testing.assert_close(images[k, 2], own, rtol=1e-4, atol=1e-4)  # a factor of 1
        change = (images[k, 3] - images[k, 1]) / 3
        torch.testing.assert_close(change, (images[k, 2] - images[k, 1]), rtol=1e-3, atol=1e-4)  # linear in it
        assert float((U[:, k] @ change).abs() / change.norm()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="components is 4, expected 1 to 3, the rank"):
        sheets.components(low_rank, omega_p[0], omega_d, factors, 4)


def test_an_edit_keeps_what_was_painted(p):
    image, mask = torch.rand(1, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="the mask is empty"):
        sheets.edit(p, image, mask, 2)
    mask[0, 1] = True
    mean, samples = sheets.edit(p, image, mask, 5)
    assert samples.shape == (5, N)
    for each in (mean, *samples):
        torch.testing.assert_close(each.reshape(1, 3, 4)[mask], image[mask])
    assert (samples.var(0).reshape(1, 3, 4)[~mask] > 0).all()


def test_what_has_no_low_rank_part_is_named():
    with pytest.raises(ValueError, match=r"runs/x: expected a distribution with a low-rank part.*structured or global"):
        sheets.drawn(PixelwiseNormal(torch.zeros(1, N), torch.ones(1, N)), 1, "runs/x")


# --- Strokes ----------------------------------------------------------------------------------------------------


def test_strokes_cover_what_is_near_them_and_later_ones_lie_above():
    image = torch.zeros(3, 9, 9)
    painted, mask = strokes.paint(
        image,
        [strokes.Stroke([(4.0, 1.0), (4.0, 7.0)], 1.0, (0.5,)), strokes.Stroke([(4.0, 4.0)], 0.5, (1.0, 0.0, 0.25))],
    )
    assert mask[0, 3:6, 1:8].all()
    assert int(mask[0].sum()) == 3 * 7 + 2  # and a pixel at each round end
    assert painted[:, 4, 4].tolist() == [1.0, 0.0, 0.25]
    assert painted[:, 4, 2].tolist() == [0.5, 0.5, 0.5]
    assert (painted[~mask] == 0).all()
    assert (image == 0).all()


@pytest.mark.parametrize(
    ("stroke", "message"),
    [
        (strokes.Stroke([(0.0, 9.0)], 1.0, (0.5,)), r"goes through \(0, 9\), outside of 9×9 pixels"),
        (strokes.Stroke([(-1.0, 0.0)], 1.0, (0.5,)), "outside of 9×9"),
        (strokes.Stroke([(0.0, 0.0)], 1.0, (0.5, 0.1)), "has 2 values, expected 1 or 3"),
    ],
)
def test_edits_outside_of_the_image_are_named(stroke, message):
    with pytest.raises(ValueError, match=f"stroke 0 .*{message}" if "has" in message else message):
        strokes.paint(torch.zeros(3, 9, 9), [stroke])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no strokes"),
        ("[3]", "stroke 0 is none"),
        ('[{"points": [[1, 2]], "radius": 1}]', "stroke 0 is none"),
        ('[{"points": [[1, 2]], "radius": 0, "value": 1}]', "a radius of 0"),
        ('[{"points": [], "radius": 1, "value": 1}]', "has no points"),
        ('[{"points": [[1, 2]], "radius": 1, "value": 1.5}]', "expected 0 to 1"),
        ('[{"points": [[1, 2]], "radius": 1, "value": 1, "colour": 2}]', "has colour, expected points"),
    ],
)
def test_files_of_strokes_are_checked(tmp_path, content, message):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        strokes.read(tmp_path / "s.json")


# --- Commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    config = faces(root / "cache").replace(training={"steps": 2, "evaluate_every": 2, "mean_only_steps": 1})
    made = {"structured": config.replace(model={"rank": 3}), "pixelwise": beta_vae(config)}
    made["global-local"] = config.replace(model={"head": "global-local"})
    return {name: str(train(each, root / name, progress=False).folder) for name, each in made.items()}


@pytest.fixture
def pictures(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (34, 32)).astype(np.uint8)
    mask = np.zeros((34, 32), np.uint8)
    mask[10:20, 5:15] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "strokes.json").write_text(json.dumps([{"points": [[3, 3], [9, 12]], "radius": 2, "value": 1}]))
    return tmp_path


@pytest.mark.parametrize("head", ["structured", "global-local"])
def test_commands_draw_their_sheets(runs, head, pictures):
    out = pictures / "out.png"
    edit = ["edit-image", runs[head], str(pictures / "image.png")]
    for args in (
        ["interpolate", runs[head], "--side=3", "--codes=2"],
        ["components", runs[head], "--components=2", "--temperature-local=0"],
        [*edit, str(pictures / "mask.png"), "--samples=2"],
        [*edit, str(pictures / "strokes.json")],
    ):
        assert main([*args, f"--out={out}"]) == 0
        with Image.open(out) as picture:
            assert min(picture.size) > 100
        out.unlink()


def test_commands_name_what_cannot_be(runs, pictures, capsys):
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(pictures / "other.png")
    (pictures / "text.png").write_text("no picture")
    (pictures / "outside.json").write_text(json.dumps([{"points": [[3, 99]], "radius": 2, "value": 1}]))
    edit = ["edit-image", runs["structured"], str(pictures / "image.png")]
    for args, message in (
        (["interpolate", runs["pixelwise"]], "has no components"),
        (["components", runs["pixelwise"]], "has no components"),
        (["components", runs["structured"], "--components=9"], "components is 9, expected 1 to 3"),
        ([*edit, str(pictures / "other.png")], "has 10×10 pixels, expected 34×32, as the image"),
        ([*edit, str(pictures / "text.png")], "cannot be read as a picture"),
        ([*edit, str(pictures / "none.png")], "is no file, expected a picture"),
        ([*edit, str(pictures / "outside.json")], "outside of 17×16 pixels"),
    ):
        assert main(args) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["edit-image", runs["structured"]])
