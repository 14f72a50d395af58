"""What is sent to the page for one code."""

import numpy as np
import pytest
import torch

from lowrank_mvn import LowRankMultivariateNormal
from sosvae import PixelwiseNormal
from sosvae.editor.parameters import pack, predict, unpack


def distribution(N=60, R=4, d=None):
    d = torch.tensor(1e-5) if d is None else d
    return LowRankMultivariateNormal(torch.rand(1, N), 0.2 * torch.randn(1, N, R), d, validate_args=False)


def test_principal_basis_has_the_same_covariance():
    p = distribution()
    prediction = predict(p)
    B = torch.from_numpy(prediction.factor).double().T
    P = p.cov_factor[0].double()
    torch.testing.assert_close(B @ B.T, P @ P.T, atol=1e-7, rtol=1e-5)
    gram = B.T @ B
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-6
    assert (gram.diagonal().diff() <= 0).all(), "the component of the largest variance comes first"
    assert prediction.d.shape == (1,)
    assert prediction.where == "page"


def test_one_variance_for_each_pixel_stays_one_for_each():
    d = 0.01 + torch.rand(1, 60)
    np.testing.assert_array_equal(predict(distribution(d=d)).d, d[0].numpy())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_there_and_back(precision):
    prediction = predict(distribution())
    original = np.arange(60, dtype=np.uint8).reshape(1, 6, 10)
    header, arrays = unpack(pack(prediction, (1, 6, 10), precision, original, code={"kind": "seed", "seed": 1}))
    assert header["shape"] == [1, 6, 10]
    assert header["code"] == {"kind": "seed", "seed": 1}
    np.testing.assert_array_equal(arrays["original"], original)
    assert arrays["d"].dtype == np.float32
    np.testing.assert_array_equal(arrays["d"], prediction.d)
    factor = arrays["factor"].astype(np.float32)
    if precision == "float16":
        factor = factor * arrays["scale"][:, None]
        off = np.abs(factor - prediction.factor).max()
        assert 0 < off <= header["error"]["factor"] < 1e-3
    else:
        np.testing.assert_array_equal(factor, prediction.factor)


def test_a_small_component_keeps_its_digits_in_float16():
    P = torch.randn(1, 60, 2) * torch.tensor([1.0, 1e-6])
    p = LowRankMultivariateNormal(torch.zeros(1, 60), P, torch.tensor(1e-5), validate_args=False)
    prediction = predict(p)
    _, arrays = unpack(pack(prediction, (1, 6, 10), "float16"))
    restored = arrays["factor"].astype(np.float32) * arrays["scale"][:, None]
    np.testing.assert_allclose(restored[1], prediction.factor[1], atol=1e-3 * np.abs(prediction.factor[1]).max())


def test_independent_pixels_have_no_factor():
    prediction = predict(PixelwiseNormal(torch.rand(1, 60), 0.1 + torch.rand(1, 60)))
    assert prediction.factor is None
    assert prediction.where == "page"
    assert "factor" not in unpack(pack(prediction, (1, 6, 10)))[1]


def test_what_the_page_has_no_formulas_for_is_the_server_s():
    class Other(torch.distributions.Distribution):
        loc = torch.rand(1, 60)

    prediction = predict(Other(validate_args=False))
    assert prediction.where == "server"
    header, arrays = unpack(pack(prediction, (1, 6, 10)))
    assert header["where"] == "server"
    assert list(arrays) == ["loc"]


def test_errors():
    with pytest.raises(ValueError, match="precision is 'float8'"):
        pack(predict(distribution()), (1, 6, 10), "float8")
    with pytest.raises(ValueError, match="no parameters"):
        unpack(b"GIF89a")
