"""Made-up measurements for the tests of `bench`."""

import dataclasses

from bench import measure
from bench.operators import BRAIN, CELEBA, OPERATORS, SMALL, Case

JOINT = OPERATORS["log_prob_entropy_backward"]
CASE = Case(5, 4, 1, batch=2, rank=3)
WHERE = {
    "date": "2026-01-02T03:04:05Z",
    "commit": "0123456789",
    "machine": "A Processor, of a kind",
    "cores": 2,
    "device": "cpu",
    "versions": "python 3.11.7; torch 2.13.0",
    "copy_bandwidth": 2e10,
    "product_rate": 2e11,
}


def measurements(*names, slower=2.0):
    """Six rounds of each, every one `slower` than the one before it."""
    errors = {"log_prob": 0.01, "entropy": 0.02, "grad_P": 1e-6, "grad_loc": 3e-6}
    seconds = [[1e-3 * slower**i * (1 + 0.01 * k) for k in range(6)] for i in range(len(names))]
    return [
        measure.Measurement(name, "ok", "", 3, 1e6 * (i + 1), "resident", errors, seconds[i])
        for i, name in enumerate(names)
    ]


def small_results(**where):
    """Rows of three sizes of N and two of R, by two peers and one that is missing."""
    found = []
    for case in (CELEBA, SMALL, BRAIN, dataclasses.replace(CELEBA, rank=10)):
        results = measurements("ours", "torch")
        for m in results:
            m.seconds = [s * case.N / 1e4 * case.rank / 25 for s in m.seconds]
        results.append(measure.Measurement("numpyro", "missing", "not installed: jax, numpyro"))
        found += measure.rows(JOINT, case, results, WHERE | where)
    return found
