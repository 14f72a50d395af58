"""Heads with a sparse precision, and what every head answers to: temperatures, tools, planning, training, commands."""

import math

import pytest
import torch
from lowrank_cases import relative
from sosvae_cases import faces, pictures, same, small
from stencil_cases import Dense
from test_sosvae_model import small as network

from lowrank_mvn import GlobalLocalNormal, LinearFactor, StencilMultivariateNormal
from sosvae import VAE, Run, condition, interpolate, scale_components, train
from sosvae.cli import main
from sosvae.models import heads
from sosvae.models.observation import own_variance, variance
from sosvae.planning.memory import PRIME_BATCH, PRIME_SIDES, StepMemory, _dry_run, _Sizes, with_images
from sosvae.tools import figures
from sosvae.tools.observation import draw_noise

LOW_RANK = ["structured", "global-local", "heavy"]


def disturbed(vae, std=0.3):
    """The network with weights of the covariance that are not those of the start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in vae.head.named_parameters():
            if not name.startswith("mean"):
                weight.add_(std * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return vae.eval()


def predicted(head, dtype=torch.float64, **model):
    vae = disturbed(VAE(network(head=head, **model)).to(dtype))
    return vae, vae.decode(torch.randn(2, 4, dtype=dtype, generator=torch.Generator().manual_seed(6)))


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [3, 5])
def test_heads_with_a_stencil_start_at_independent_pixels(channels, side):
    for head in ("precision", "global-local"):
        p = VAE(network(head=head, channels=channels, neighbourhood=side, width=1.0)).decode(torch.randn(2, 4))
        local = p.stencil.variance()
        torch.testing.assert_close(local, torch.full_like(local, 6e-3), rtol=1e-5, atol=0)
        assert torch.count_nonzero(p.stencil.row(7, p.event_shape[0])[0]) == 1
    assert isinstance(p, GlobalLocalNormal)
    assert float(p.cov_factor.std()) < 0.1
    weight = VAE(network(head="global-local", width=1.0)).head.factor.weight
    assert float(weight.std()) == pytest.approx(1e-2, rel=0.3)


@pytest.mark.parametrize("head", ["precision", "global-local"])
@pytest.mark.parametrize("channels", [1, 3])
def test_density_is_that_of_the_dense_covariance(head, channels):
    _, p = predicted(head, channels=channels, height=16, width_=16)
    x = p.loc + 0.1 * torch.randn_like(p.loc)
    dense = Dense(p.loc, p.stencil, p.cov_factor if head == "global-local" else None)
    torch.testing.assert_close(p.log_prob(x), dense.log_prob(x))
    torch.testing.assert_close(p.log_prob_and_entropy(x)[1], dense.entropy())
    if channels == 3 and head == "precision":
        # At one pixel a channel is tied to the later ones, and to later pixels of its own channel only.
        Lambda = torch.linalg.inv(dense.covariance)[0].view(3, 16, 16, 3, 16, 16)
        assert Lambda[0, 5, 5, 1, 5, 5].abs() > 1e-3
        assert Lambda[2, 5, 5, 2, 5, 6].abs() > 1e-3


def test_degrees_of_freedom_are_learned_and_leave_a_covariance():
    vae, p = predicted("heavy")
    assert VAE(network(head="heavy")).decode(torch.zeros(1, 4)).df.item() == pytest.approx(10)
    assert (p.df > 2).all()
    p.log_prob(p.loc.detach() + 0.5).sum().backward()
    assert vae.head.degrees.grad.abs() > 0
    assert {"entropy"} == set(type(vae.head).limits(network(head="heavy")))


def test_variance_given_later_pixels_has_a_floor():
    vae = VAE(network(head="precision"))
    with torch.no_grad():
        vae.head.stencil.weights.bias[0] = -100
    p = vae.decode(torch.randn(1, 4))
    torch.testing.assert_close(p.variance, torch.full_like(p.variance, 1e-5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_factor_of_global_local_may_be_made(channels):
    """The same density, samples and gradients."""
    vae, p = predicted("global-local", channels=channels)
    made = VAE(network(head="global-local", channels=channels, factor="materialised")).double().eval()
    made.load_state_dict(vae.state_dict())
    assert isinstance(p._parameters.factor, LinearFactor)
    assert isinstance(p._parameters.factor.whitened(p.stencil, "aten"), LinearFactor)  # in colour too
    x, z = torch.rand(2, 1 * channels * 17 * 19, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    def results(vae):
        vae.zero_grad()
        p = vae.decode(z)
        log_prob, entropy = p.log_prob_and_entropy(x)
        (log_prob + 0.3 * entropy).sum().backward()
        torch.manual_seed(0)
        named = {"log_prob": log_prob.detach(), "entropy": entropy.detach(), "sample": p.rsample((2,)).detach()}
        return named | {name: w.grad for name, w in vae.head.named_parameters()}

    theirs = results(made)
    for name, value in results(vae).items():
        assert relative(value, theirs[name]) < 1e-9, name


@pytest.mark.parametrize("head", heads.NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_temperatures_scale_what_is_global_and_what_is_local(head, channels):
    _, p = predicted(head, channels=channels)
    omega_d = torch.randn(3, *p.loc.shape, dtype=torch.float64)
    omega_p = torch.randn(3, 2, 3, dtype=torch.float64)
    noise = omega_p, omega_d
    y = p.rsample((3,), noise=noise)
    common, local = (p.rsample((3,), noise=noise, temperature=t) - p.loc for t in ((1, 0), (0, 1)))
    torch.testing.assert_close(p.loc + common + local, y)
    mixed = p.rsample((3,), noise=noise, temperature=(0.3, 2))
    torch.testing.assert_close(mixed, p.loc + 0.3 * common + 2 * local)
    torch.testing.assert_close(p.rsample(temperature=(0, 0)), p.loc)
    if head in LOW_RANK:
        torch.testing.assert_close(common, (p.cov_factor @ omega_p.unsqueeze(-1)).squeeze(-1))
    else:
        assert not common.any()
    # Without given noise: the variance of samples.
    samples = p.rsample((4000,), temperature=(0.5, 0))[:, 0, :20]
    expected = 0.25 * p.cov_factor[0, :20].square().sum(-1) if head in LOW_RANK else torch.zeros(20).double()
    widening = p.df[0] / (p.df[0] - 2) if head == "heavy" else 1
    torch.testing.assert_close(samples.var(0), widening * expected, rtol=0.2, atol=1e-12)
    with pytest.raises((TypeError, ValueError), match="temperature must be a pair"):
        p.rsample(temperature=1.0)


@pytest.mark.parametrize("head", heads.NAMES)
def test_every_head_can_be_conditioned_and_read(head):
    vae, p = predicted(head, height=16, width_=16)
    edited, mask = torch.rand(1, 16, 16, dtype=torch.float64), torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 3:5, 4:9] = True
    conditional = condition(p, edited, mask)
    image = vae.unflatten(conditional.rsample())
    torch.testing.assert_close(image[:, mask], edited[mask].expand(2, -1))
    found, how = variance(p)
    assert how == "exact"
    row = p.covariance_row(37)
    torch.testing.assert_close(row[:, 37], found[:, 37])
    assert (row - own_variance(p))[:, 37].abs().max() > 0 or head == "pixelwise"
    with pytest.raises(ValueError, match=r"mask has shape \[1, 16, 15\], expected \[\.\.\., channels, H, W\]"):
        condition(p, edited, mask[..., :15])


@pytest.mark.parametrize("head", LOW_RANK)
def test_low_rank_parts_turn_and_stretch(head):
    _, p = predicted(head)
    omega_p, omega_d = draw_noise(p, 2)
    path = interpolate(p, omega_p[0], omega_p[1], omega_d[0], steps=4)
    torch.testing.assert_close(path[-1], p.rsample(noise=(omega_p[1], omega_d[0])))
    still = interpolate(p, omega_p[0], omega_p[1], omega_d[0], 4, temperature=(0, 1))
    torch.testing.assert_close(still, still[:1].expand_as(still))
    factors = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    scaled = scale_components(p, factors)
    assert type(scaled) is type(p)
    s = torch.linalg.svdvals(p.cov_factor)
    expected = (s * factors).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(scaled.cov_factor), expected, atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("head", sorted(set(heads.NAMES) - set(LOW_RANK)))
def test_heads_without_a_low_rank_part_say_so(head):
    _, p = predicted(head)
    noise = torch.zeros(2, 3, dtype=torch.float64)
    for call in (
        lambda: draw_noise(p, 1),
        lambda: interpolate(p, noise, noise, p.loc, 3),
        lambda: scale_components(p, torch.ones(3)),
    ):
        with pytest.raises(TypeError, match=f"low-rank part, got {type(p).__name__}, which has no components"):
            call()


def test_more_neighbours_than_the_image_has():
    from sosvae.models.heads.base import StencilWeights

    with pytest.raises(
        ValueError, match=r"neighbourhood \(5, 5\) has neighbours that no pixel of an image of \[2, 9\]"
    ):
        StencilWeights(3, 1, 5, 1, False)(torch.zeros(1, 3, 2, 9))


def test_variances_of_large_images_are_estimated_and_say_so(monkeypatch):
    vae, p = predicted("global-local")
    monkeypatch.setattr("sosvae.models.observation.EXACT_VALUES", 100)
    found, how = variance(p)
    assert how == "estimated from 64 samples"
    assert ((found / p.variance).log().abs().mean()) < 0.3
    assert figures.predict(vae.float(), 1).how == how


@pytest.mark.parametrize("head", heads.NAMES)
def test_layers_of_a_head_leave_the_mean_alone(head):
    config = network(head=head, head_layers=2)
    vae = VAE(config)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in vae.head.layers) == 2
    disturbed(vae)
    p = vae.decode(torch.randn(2, 4))
    p.loc.sum().backward()
    assert {n for n, w in vae.head.named_parameters() if w.grad is not None} == {"mean.weight", "mean.bias"}
    p = vae.decode(torch.randn(2, 4))
    (-p.log_prob(torch.rand(2, 17 * 19))).sum().backward()
    assert all(w.grad is not None for w in vae.head.parameters())


# --- Training, planning, commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["precision", "global-local"])
@pytest.mark.parametrize(("height", "width", "batch"), [(16, 16, 2), (37, 50, 3)])
def test_planning_knows_their_memory(head, height, width, batch):
    config = network(head=head, channels=3)
    there = _dry_run(with_images(config, height, width, batch), "linear", False)
    prime = _dry_run(with_images(config, PRIME_SIDES[0], PRIME_SIDES[0], PRIME_BATCH), "linear", False)
    assert prime.events == there.events
    assert _Sizes(prime).at(height, width, batch).tolist() == there.sizes
    memory = StepMemory(config)
    assert memory.peak(32, 2).likelihood < memory.peak(64, 2).likelihood


@pytest.mark.parametrize("head", ["precision", "global-local"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_they_train_and_go_on_bit_for_bit(head, precision, tmp_path):
    config = faces(tmp_path / "cache").replace(model={"head": head}, training={"precision": precision, "steps": 6})
    whole = train(config, tmp_path / "whole", progress=False)
    parted = train(config.replace(training={"steps": 3}), tmp_path / "parted", progress=False)
    parted = train(config, tmp_path / "parted", resume=True, progress=False)
    assert same(parted.load(6).weights, whole.load(6).weights)
    assert set(whole.load().state["multipliers"]) == {"kl"}


@pytest.fixture(scope="module", params=["precision", "global-local"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = small(pictures(folder / "in"), folder / "cache").replace(model={"head": request.param})
    return train(config, folder / "run", progress=False)


def test_commands_take_temperatures(run, tmp_path, capsys):
    def image(command, *options):
        path = tmp_path / "x.png"
        assert main([command, str(run.folder), "--out", str(path), "--samples", "1", *options]) == 0
        return path.read_bytes()

    for command in ("sample", "reconstruct"):
        calm = image(command, "--temperature-global", "0", "--temperature-local", "0")
        assert image(command) != calm
        assert image(command, "--temperature-local", "0.5") not in (calm, image(command))
    with pytest.raises(SystemExit):
        main(["sample", str(run.folder), "--temperature-local", "-1"])
    assert "temperature_local is -1.0, expected at least 0" in " ".join(capsys.readouterr().err.split())


@torch.no_grad()
def test_runs_open_and_predict(run):
    vae = Run.open(run.folder).model()
    p = vae.decode(torch.zeros(1, vae.latents))
    assert isinstance(p, StencilMultivariateNormal | GlobalLocalNormal)
    assert math.isfinite(float(p.log_prob(torch.rand(1, 256))))
    assert figures.predict(vae, 2).variance.shape == (2, 1, 16, 16)
