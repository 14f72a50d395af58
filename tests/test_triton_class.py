"""The distribution class with the kernels: a compiled step, samples, and that nothing in a step waits for the host.

Runs as `test_triton_kernels.py` does; what the class shares with torch's is in `test_distribution_contract.py`.
"""

import pytest
import torch
from triton_cases import DEVICE, INTERPRET, MARKS

import lowrank_mvn
from lowrank_mvn import LowRankMultivariateNormal
from lowrank_mvn.device import launch, solve

pytestmark = [*MARKS, pytest.mark.usefixtures("backend")]


def parameters(batch=(2,), N=7, R=3, dtype=torch.float32, device=DEVICE):
    options = {"dtype": dtype, "device": device}
    loc, P = torch.randn(*batch, N, **options), torch.randn(*batch, N, R, **options)
    return loc, P, 0.5 + torch.rand(*batch, N, **options)


def step(loc, P, d, x, omega_p, omega_d):
    """Values and gradients of everything that training asks for; checks of values would read them on the host."""
    D = LowRankMultivariateNormal(loc, P, d, validate_args=False)
    log_prob, entropy = D.log_prob(x), D.entropy()
    drawn, given = D.rsample((2,)), D.rsample(noise=(omega_p, omega_d))
    loss = entropy.sum() - log_prob.sum() + drawn.square().sum() + given.square().sum()
    grads = torch.autograd.grad(loss, (loc, P, d, x))
    return log_prob, entropy, given, drawn, *grads


def arguments(device=DEVICE):
    loc, P, d = parameters(device=device)
    noise = torch.randn(2, 3, device=device), torch.randn(2, 7, device=device)
    return *(t.requires_grad_() for t in (loc, P, d, torch.randn(2, 7, device=device))), *noise


# --- Compiled -----------------------------------------------------------------------------------------------------


def test_a_compiled_step_has_no_graph_break():
    *leaves, omega_p, omega_d = arguments()

    def loss(loc, P, d, x):
        D = LowRankMultivariateNormal(loc, P, d, validate_args=False)
        log_prob, entropy = D.log_prob(x), D.entropy()
        y, given = D.rsample((2,)), D.rsample(noise=(omega_p, omega_d))
        return log_prob.sum() + entropy.sum() + y.square().sum() + given.square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager" if INTERPRET else "inductor")):
        torch.manual_seed(0)
        value = function(*leaves)
        found.append((value, *torch.autograd.grad(value, leaves)))
    if INTERPRET:  # inductor draws from a generator of its own
        torch.testing.assert_close(*found)
    else:
        assert all(t.isfinite().all() for t in found[1])


# --- Samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 1)])
def test_sample_shapes(shape):
    D = LowRankMultivariateNormal(*parameters())
    assert D.rsample(shape).shape == D.sample(shape).shape == (*shape, 2, 7)
    assert D.expand((3, 2)).rsample(shape).shape == (*shape, 3, 2, 7)


def test_seeds():
    D = LowRankMultivariateNormal(*parameters())
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(D.sample((2,)))
    assert torch.equal(samples[0], samples[1])
    assert not (samples[0] == samples[2]).any()
    assert not (samples[0][0] == samples[0][1]).any()  # nor do samples or items share their noise
    assert not (samples[0][:, 0] - D.loc[0] == samples[0][:, 1] - D.loc[1]).any()


def test_the_noise_is_another_stream_than_torchs():
    loc, P, d = parameters()
    samples = []
    for impl in ("triton", "aten"):
        torch.manual_seed(1)
        samples.append(lowrank_mvn.rsample(loc, 0 * P, d, impl=impl))
    assert not torch.isclose(*samples).any()
    assert "another stream" in " ".join(LowRankMultivariateNormal.__doc__.split())


def test_given_noise():
    loc, P, d = (t.requires_grad_() for t in parameters(dtype=torch.float64))
    omega_p, omega_d = (
        torch.randn(4, 1, 3, dtype=loc.dtype, device=DEVICE),
        torch.randn(7, dtype=loc.dtype, device=DEVICE),
    )
    y = LowRankMultivariateNormal(loc, P, d).rsample((4,), noise=(omega_p, omega_d))
    expected = loc + (P @ omega_p.unsqueeze(-1)).squeeze(-1) + d.sqrt() * omega_d
    torch.testing.assert_close(y, expected)
    w = torch.randn_like(y)
    grads = [torch.autograd.grad((t * w).sum(), (loc, P, d)) for t in (y, expected)]
    torch.testing.assert_close(*grads)


def test_a_sample_of_half_precision_parameters():
    loc, P, d = parameters(dtype=torch.bfloat16)
    D = LowRankMultivariateNormal(loc, P, d.float())
    assert D.sample((2,)).dtype == torch.bfloat16
    assert D.log_prob(loc).dtype == torch.float32


# --- Nothing waits for the host -------------------------------------------------------------------------------------

# A meta tensor has no values: whatever asks for one, or for a shape that depends on one, is an error.


@pytest.fixture
def unlaunched(monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: None)
    monkeypatch.setattr(launch, "target", lambda device: "sm_90")


def whole_step_of_the_launchers(kernels, dtype=torch.float32):
    """All that the operators do between their arguments and the launches."""
    for S, diagonal in ((1, "pixel"), (2, "item")):
        options = {"device": "meta", "dtype": dtype}
        x, loc, P = (torch.empty(*shape, **options) for shape in ((S, 2, 70), (1, 2, 70), (2, 70, 5)))
        d, omega_p = torch.empty(2, 70 if diagonal == "pixel" else 1, **options), torch.empty(S, 2, 5, **options)
        seed = torch.empty(2, device="meta", dtype=torch.int64)
        q, logdet, *kept = kernels.mahalanobis_and_logdet(x, loc, P, d)
        kernels.mahalanobis_and_logdet(x, loc, P, d, kept[0], logdet, kept[-1])
        kernels.mahalanobis_and_logdet_backward(q, logdet, x, loc, P, d, *kept, [True] * 4)
        kernels.normal_equations(x, loc, P, d)
        log_det, *kept = kernels.logdet(P, d)
        kernels.logdet_backward(log_det, P, d, *kept, [True, True])
        kernels.noise(seed, S, 70, dtype)
        y = kernels.rsample(loc, P, d, omega_p, None, seed)
        kernels.rsample_backward(y, P, d, omega_p, None, seed, [True, True, False])


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_launcher_reads_a_value(kernels, dtype):
    whole_step_of_the_launchers(kernels, dtype)


READS = {
    "item": lambda t: t.any().item(),
    "bool": bool,
    "int": lambda t: int(t.sum()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "nonzero": torch.nonzero,
    "mask": lambda t: t[t],
    "equal": lambda t: torch.equal(t, t),
}


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("name", READS)
def test_a_read_would_be_seen(kernels, monkeypatch, name):
    plain = solve.solve

    def reads(parts, d, N, out, *options):
        plain(parts, d, N, out, *options)
        READS[name](out[-1][:1])

    monkeypatch.setattr(solve, "solve", reads)
    with pytest.raises((RuntimeError, NotImplementedError)):
        whole_step_of_the_launchers(kernels)


if INTERPRET:  # where the operators take tensors that are not a GPU's

    def test_no_step_of_the_class_reads_a_value():
        loc, P, d, x, *noise = arguments("meta")
        for diag in (d, d[:, :1].detach().requires_grad_()):
            assert all(t.is_meta for t in step(loc, P, diag, x, *noise))
        D = LowRankMultivariateNormal(loc, P, 1e-5, validate_args=False)
        assert D.condition(x, x > 0).loc.is_meta
        assert D.log_prob(torch.randn(3, 1, 7, device="meta")).shape == (3, 2)

    def test_a_read_in_the_class_would_be_seen():
        loc, P, d, x, *_ = arguments("meta")
        with pytest.raises(RuntimeError):
            LowRankMultivariateNormal(loc, P, d, validate_args=False).log_prob(x).sum().item()

else:

    def test_a_captured_step_replays_with_other_inputs():
        """Densities, samples and gradients from a CUDA graph, on inputs that it was not captured with."""
        held = arguments()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and fills the allocator
            for _ in range(3):
                step(*held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step(*held)
        drawn = []
        for collinear in (False, True):  # the second time an item needs float64, which only the device knows
            others = arguments()
            with torch.no_grad():
                if collinear:
                    others[1][1, :, 1] = others[1][1, :, 0] * (1 + 1e-6)
                    others[2].fill_(1e-5)
                for t, other in zip(held, others, strict=True):
                    t.copy_(other)
            graph.replay()
            torch.cuda.synchronize()
            for ours, theirs in zip(replayed[:3], step(*held)[:3], strict=True):
                assert torch.equal(ours, theirs)
            drawn.append((replayed[3] - held[0]).clone())
            # Its gradients are those of the noise it was drawn with: of μ, both samples' and the density's.
            _, _, given, y, *grads = replayed
            D = LowRankMultivariateNormal(*held[:3], validate_args=False)
            (of_density,) = torch.autograd.grad(-D.log_prob(held[3]).sum(), held[0])
            torch.testing.assert_close(grads[0], of_density + 2 * y.sum(0) + 2 * given, rtol=1e-4, atol=1e-4)
            assert all(g.isfinite().all() for g in grads)
        assert not (drawn[0] == drawn[1]).any()  # each replay draws anew
