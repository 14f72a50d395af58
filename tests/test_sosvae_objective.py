"""The objective: its terms, its limits, and the multipliers held against cooper's."""

import cooper
import pytest
import torch
import torch.distributions as td

from sosvae import VAE, Config, DataConfig, ModelConfig, ObjectiveConfig, Terms
from sosvae.objective import Constraints, evaluate_terms, objective

CONFIG = Config(
    data=DataConfig(height=16, width=16),
    model=ModelConfig(rank=2, latents=3, width=0.05, depth=1, diagonal=1e-2),
    objective=ObjectiveConfig(kl_slack=2.0, nats_per_rank=1.5),
)


def terms_of(log_prob, kl, entropy):
    return Terms(*(torch.tensor(values, requires_grad=True) for values in (log_prob, kl, entropy)))


def test_terms_are_those_of_the_distributions():
    vae = VAE(CONFIG).eval()
    x = torch.rand(4, 1, 16, 16)
    torch.manual_seed(3)
    terms, _ = evaluate_terms(vae, x)
    torch.manual_seed(3)
    q = vae.encode(x)
    p = vae.decode(q.rsample())
    standard = td.Normal(0.0, 1.0)
    torch.testing.assert_close(terms.log_prob, p.log_prob(x.flatten(1)))
    torch.testing.assert_close(terms.entropy, p.entropy())
    torch.testing.assert_close(terms.kl, td.kl_divergence(q, standard).sum(-1))
    assert [term.shape for term in terms] == [(4,)] * 3


@pytest.mark.parametrize(
    ("model", "objective_", "expected"),
    [
        ({}, {}, {"kl", "entropy"}),
        ({"fixed_diagonal": False}, {}, {"kl", "entropy"}),
        ({}, {"entropy_constraint": False}, {"kl"}),
        ({}, {"kl_slack": None}, {"entropy"}),
        ({"head": "pixelwise"}, {}, {"kl"}),
    ],
    ids=["all", "learned diagonal", "no entropy constraint", "beta", "pixelwise"],
)
def test_stabilisers_are_switches(model, objective_, expected):
    constraints = Constraints.of(CONFIG.replace(model=model, objective=objective_))
    assert constraints.limits.keys() == constraints.multipliers.keys() == expected


def test_damping_acts_on_both_sides_and_takes_no_gradient():
    terms = terms_of([1.0, 3.0], [5.0, 1.0], [0.0, -4.0])
    constraints = Constraints({"kl": 2.0, "entropy": 1.0}, damping=10.0)
    g = constraints.violations(terms)
    assert (g["kl"].item(), g["entropy"].item()) == (1.0, -3.0)
    constraints.multipliers["kl"] += 4
    loss = objective(terms, constraints, CONFIG.objective)
    assert loss.item() == pytest.approx(-2 + (4 + 10 * 1) * 1 + (0 - 10 * 3) * -3)
    loss.backward()
    torch.testing.assert_close(terms.log_prob.grad, torch.full((2,), -0.5))
    torch.testing.assert_close(terms.kl.grad, torch.full((2,), 14 / 2))
    torch.testing.assert_close(terms.entropy.grad, torch.full((2,), -30 / 2))
    assert not constraints.multipliers["kl"].requires_grad


def test_beta_weighs_the_kl_where_it_is_not_constrained():
    terms = terms_of([1.0, 3.0], [5.0, 1.0], [0.0, 0.0])
    loss = objective(terms, Constraints({}), ObjectiveConfig(kl_slack=None, beta=4.0))
    assert loss.item() == pytest.approx(-2 + 4 * 3)


class Toy(cooper.ConstrainedMinimizationProblem):
    """min ‖x − (2, 1)‖² under x₀ ≤ 1 and x₁ ≤ 3: the first limit is active, the second is not."""

    limits = torch.tensor([1.0, 3.0])

    def __init__(self, x, formulation, kind, **kwargs):
        super().__init__()
        self.x = x
        multiplier = cooper.multipliers.DenseMultiplier(num_constraints=2)
        self.constraint = cooper.Constraint(
            constraint_type=kind, multiplier=multiplier, formulation_type=formulation, **kwargs
        )

    def compute_cmp_state(self):
        state = cooper.ConstraintState(violation=self.x - self.limits)
        return cooper.CMPState(
            loss=(self.x - torch.tensor([2.0, 1.0])).square().sum(),
            observed_constraints={self.constraint: state},
        )


def ours(start, steps, lr, damping):
    """The same problem by `objective` and `Constraints`, one value of the batch being all there is."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=lr)
    constraints = Constraints({"kl": 1.0, "entropy": 3.0}, damping, lr=1.0)
    multipliers = constraints.multipliers
    path = []
    for _ in range(steps):
        loss = (x - torch.tensor([2.0, 1.0])).square().sum()
        terms = Terms(-loss[None], x[:1], x[1:])
        optimizer.zero_grad()
        objective(terms, constraints, ObjectiveConfig()).backward()
        constraints.ascend(terms)
        optimizer.step()
        path.append(torch.cat([x.detach(), multipliers["kl"][None], multipliers["entropy"][None]]))
    return torch.stack(path)


def cooper_path(start, steps, lr, formulation, kind, **kwargs):
    x = torch.nn.Parameter(start.clone())
    problem = Toy(x, formulation, kind, **kwargs)
    primal = torch.optim.SGD([x], lr=lr)
    dual = torch.optim.SGD(problem.dual_parameters(), lr=1.0, maximize=True)
    both = cooper.optim.SimultaneousOptimizer(cmp=problem, primal_optimizers=primal, dual_optimizers=dual)
    path = []
    for _ in range(steps):
        both.roll()
        path.append(torch.cat([x.detach().clone(), problem.constraint.multiplier().detach().clone()]))
    return torch.stack(path)


def test_multipliers_move_and_are_clamped_as_those_of_cooper():
    start = torch.tensor([3.0, 4.0])  # both limits are passed at first; then the second multiplier goes back to 0
    theirs = cooper_path(start, 200, 0.05, cooper.formulations.Lagrangian, cooper.ConstraintType.INEQUALITY)
    mine = ours(start, 200, 0.05, damping=0.0)
    torch.testing.assert_close(mine, theirs)
    assert mine[:, 3].max() > 0
    assert mine[-1, 3] == 0


def test_damping_is_the_augmented_lagrangian_of_cooper():
    # Its penalty on an equality acts on both sides, as the damping does; both limits stay passed here, so that the
    # multipliers are never clamped and equality and inequality are one.
    start = torch.tensor([1.5, 3.5])
    theirs = cooper_path(
        start,
        4,
        0.001,
        cooper.formulations.AugmentedLagrangian,
        cooper.ConstraintType.EQUALITY,
        penalty_coefficient=cooper.penalty_coefficients.DensePenaltyCoefficient(torch.tensor([10.0, 10.0])),
    )
    torch.testing.assert_close(ours(start, 4, 0.001, damping=10.0), theirs)


def test_the_damped_method_reaches_the_constrained_optimum():
    path = ours(torch.tensor([3.0, 0.0]), 4000, 0.02, damping=10.0)
    # x₀ at its limit with λ = −∂f/∂x₀ = 2. The damping holds x₁ near its limit too: ½·10·(x₁ − 3)² joins (x₁ − 1)².
    torch.testing.assert_close(path[-1, [0, 2]], torch.tensor([1.0, 2.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(path[-1, 1], torch.tensor((1.0 + 15.0) / 6.0), atol=1e-3, rtol=0)
    assert path[-1, 3] == 0
