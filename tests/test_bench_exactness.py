"""The documents' table of errors against float64."""

from pathlib import Path

from bench import exactness

ROOT = Path(__file__).parent.parent


def test_exactness_of_the_table():
    n = 3000
    for ratio in exactness.KINDS.values():
        log_p, gradients = exactness.errors(ratio, n)["ours"]
        assert 0 < log_p < 0.05
        assert 0 < gradients < 1e-3
    assert exactness.errors(1.0, n)["torch"][0] > 1  # d = 1e-5 in float32
    lines = exactness.table(n).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["columns of P", "---", *exactness.KINDS]
    assert "raises" in lines[-1]
    assert lines[0] in (ROOT / "docs" / "exactness.md").read_text()
