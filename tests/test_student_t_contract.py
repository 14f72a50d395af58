"""`LowRankMultivariateStudentT` as a distribution of torch: shapes, copies, wrappers, compilation, bad input.

`test_triton_session.py` runs it with the kernels.
"""

import copy
import pickle

import pytest
import torch
import torch.distributions as td
from lowrank_cases import parameters
from lowrank_cases import student_t as make

import lowrank_mvn
from lowrank_mvn import LowRankMultivariateStudentT

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
F32, F64 = torch.float32, torch.float64


def test_shapes_and_attributes():
    loc, P, d = parameters((3,), 7, 2)
    D = LowRankMultivariateStudentT(torch.tensor([[3.0], [5.0]], dtype=F64), loc, P[0], d[1])
    assert (D.batch_shape, D.event_shape, D.has_rsample) == ((2, 3), (7,), True)
    assert D.df.shape == D.entropy().shape == D.perplexity().shape == (2, 3)
    assert D.loc.shape == D.cov_diag.shape == D.mean.shape == D.mode.shape == D.variance.shape == (2, 3, 7)
    assert D.stddev.shape == D.covariance_row(-1).shape == (2, 3, 7)
    assert D.cov_factor.shape == (2, 3, 7, 2)
    assert D.rsample((2, 1)).shape == (2, 1, 2, 3, 7)
    assert D.log_prob(torch.zeros(4, 1, 1, 7, dtype=F64)).shape == (4, 2, 3)
    assert D.rank() == 2
    assert all(hasattr(D, name) for name in D.arg_constraints)
    assert repr(D) == (
        "LowRankMultivariateStudentT(df: torch.Size([2, 3]), loc: torch.Size([2, 3, 7]),"
        " cov_factor: torch.Size([2, 3, 7, 2]), cov_diag: torch.Size([2, 3, 7]))"
    )
    assert make(batch=(0,)).log_prob(torch.zeros(0, 7, dtype=F64)).shape == (0,)


def test_expand_and_copies():
    D = make(torch.tensor([3.0, 4.0, 5.0], dtype=F64))
    x = torch.randn(3, 7, dtype=F64)
    E = D.expand((4, 3))
    assert type(E) is type(D)
    torch.testing.assert_close(E.log_prob(x), D.log_prob(x).expand(4, 3))
    torch.testing.assert_close(E.entropy(), D.entropy().expand(4, 3))
    assert E.sample((2,)).shape == (2, 4, 3, 7)
    for copied in (copy.deepcopy(D), pickle.loads(pickle.dumps(D)), copy.copy(D)):
        torch.testing.assert_close((copied.log_prob(x), copied.entropy()), (D.log_prob(x), D.entropy()))


def test_wrapped_by_other_distributions():
    D = make()
    x = torch.randn(3, 7, dtype=F64)
    torch.testing.assert_close(td.Independent(D, 1).log_prob(x), D.log_prob(x).sum(-1))
    exp = td.TransformedDistribution(D, [td.ExpTransform()])
    torch.testing.assert_close(exp.log_prob(x.exp()), D.log_prob(x) - x.sum(-1))
    mixture = td.MixtureSameFamily(td.Categorical(torch.ones(3)), D)
    assert mixture.log_prob(x[0]).shape == ()


def test_a_compiled_step_has_no_graph_break():
    loc, P, d = parameters((3,), 7, 2)
    df, x = torch.tensor(3.0, dtype=F64, requires_grad=True), torch.randn(3, 7, dtype=F64)

    def step(df, loc, P, d, x):
        D = LowRankMultivariateStudentT(df, loc, P, d, validate_args=False)
        return (*D.log_prob_and_entropy(x), D.rsample((2,)))

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        out = function(df, loc, P, d, x)
        found.append((*out, *torch.autograd.grad(sum(t.sum() for t in out), df)))
    torch.testing.assert_close(*found)


def test_tensors_without_values():
    loc, P, d = (t.to("meta") for t in parameters((3,), 7, 2))
    D = LowRankMultivariateStudentT(3.0, loc, P, d)
    found = D.log_prob(loc), D.entropy(), D.rsample((2,)), D.variance, D.condition(loc, loc > 0).loc
    assert [t.shape for t in found] == [(3,), (3,), (2, 3, 7), (3, 7), (3, 7)]


def test_half_precision_gives_a_float32_density():
    loc, P, d = parameters((3,), 7, 2, dtype=torch.bfloat16)
    D = LowRankMultivariateStudentT(3.0, loc, P, d.float())
    wide = LowRankMultivariateStudentT(3.0, loc.float(), P.float(), d.float())
    assert D.log_prob(loc).dtype == F32
    torch.testing.assert_close(D.log_prob(loc), wide.log_prob(loc.float()))
    assert D.rsample().dtype == torch.bfloat16


def bad(error, message, df=3.0, then=lambda D: None, **changed):
    return error, message, df, then, changed


BAD = {
    "zero": bad(ValueError, r"parameter df .* found values that are not positive", df=0.0),
    "negative": bad(ValueError, "parameter df", df=torch.tensor([1.0, -1.0, 2.0])),
    "nan": bad(ValueError, "parameter df", df=torch.tensor(float("nan"))),
    "string": bad(TypeError, "df must be a number or a floating-point tensor, got str", df="3"),
    "bool": bad(TypeError, "df must be a number or a floating-point tensor, got bool", df=True),
    "integers": bad(TypeError, "df must be a number or a floating-point tensor, got", df=torch.tensor([1, 2, 3])),
    "batch": bad(ValueError, "Incompatible batch shapes of df and of loc, cov_factor and cov_diag", df=torch.ones(2)),
    "device": bad(ValueError, "df is on meta, loc on c", df=torch.ones(3, device="meta")),
    "diagonal": bad(ValueError, "parameter cov_diag", cov_diag=-torch.ones(7)),
    "loc": bad(ValueError, r"loc has shape \[6\], expected \[\.\.\., 7\]", loc=torch.zeros(6)),
    "value": bad(ValueError, r"value has shape \[8\]", then=lambda D: D.log_prob(torch.zeros(8))),
    "value-nan": bad(ValueError, "support", then=lambda D: D.log_prob(torch.full((7,), float("nan")))),
    "u": bad(ValueError, r"u has shape \[2\], expected one that broadcasts to \[3\]",
             then=lambda D: D.rsample(u=torch.ones(2))),
    "noise": bad(ValueError, r"noise\[0\] has shape \[5\]",
                 then=lambda D: D.rsample(noise=(torch.zeros(5), torch.zeros(7)))),
    "mask": bad(TypeError, "observed must be a tensor of dtype bool",
                then=lambda D: D.condition(torch.zeros(7), torch.ones(7))),
    "row": bad(ValueError, r"index 7 is out of range for event shape \[7\]", then=lambda D: D.covariance_row(7)),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "df", "then", "changed"), BAD.values(), ids=BAD)
def test_bad_input(error, message, df, then, changed):
    loc, P, d = parameters((3,), 7, 2, dtype=F32)
    arguments = {"loc": loc, "cov_factor": P, "cov_diag": d, **changed}
    with pytest.raises(error, match=message):
        then(LowRankMultivariateStudentT(df, **arguments, validate_args=True))


def test_public():
    assert "LowRankMultivariateStudentT" in lowrank_mvn.__all__
