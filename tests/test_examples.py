"""The examples run, in seconds, and what they gain is what they say."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"


def printed(output, pattern):
    """The numbers in place of each `#` of a pattern, a row for each line that has it, after the line's title."""
    regex = re.escape(pattern).replace(r"\#", NUMBER)
    found = [(line.partition(":")[0], re.search(regex, line)) for line in output.splitlines()]
    return {title: tuple(map(float, match.groups())) for title, match in found if match}


def vae_digits(output):
    elbo = printed(output, "ELBO # nats")
    speckle = printed(output, "samples #, held-out deviations #")
    assert elbo["low-rank plus diagonal"] > elbo["independent pixels"]
    for title, (samples, held_out) in speckle.items():
        smooth = title == "low-rank plus diagonal"
        assert abs(samples - held_out) < 0.2 if smooth else abs(samples) < 0.1 < held_out


def segmentation(output):
    nats = printed(output, "held out # nats")
    assert nats["lowrank_mvn"] > nats["independent logits"]
    if "torch's class" in nats:  # else its factorisation failed, and the line says so
        assert nats["torch's class"][0] == pytest.approx(nats["lowrank_mvn"][0], rel=0.05)
    else:
        assert "not positive definite" in output
    areas = printed(output, "vary by #%")
    assert areas["lowrank_mvn"][0] > 3 * areas["independent logits"][0]


def forecaster(output):
    nats, covered = printed(output, "held out # nats"), printed(output, "hold #%")
    assert nats["independent"] < nats["low-rank normal"] < nats["low-rank Student's t"]
    assert covered["independent"][0] < 80 < covered["low-rank normal"][0]


def pyro_guide(output):
    elbo, error = printed(output, "ELBO # nats"), printed(output, "off by # nats")
    assert elbo["lowrank_mvn"][0] == pytest.approx(elbo["torch's class"][0], rel=0.01)
    assert error["lowrank_mvn"][0] < 0.05 < 20 * error["lowrank_mvn"][0] < error["torch's class"][0]


def third_party(output):
    elbo = printed(output, "ELBO # nats")
    assert elbo["patch_torch()"][0] == pytest.approx(elbo["torch's class"][0], rel=0.01)
    classes = re.findall(r"the class is from (\w+)", output)
    assert classes == ["torch", "lowrank_mvn"]


def pca(output):
    found = [re.search(rf"^{name}\b.* {NUMBER} bits", output, re.M) for name in ("one variance", "global")]
    one, head = (float(match[1]) for match in found)
    assert head < one - 0.5


CHECKS = {f.__name__: f for f in (pca, vae_digits, segmentation, forecaster, pyro_guide, third_party)}


def test_every_example_is_checked():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_example(name, tmp_path):
    path = FOLDER / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert "Replaced:" in text
    assert "Gained:" in text
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    CHECKS[name](done.stdout)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())  # a picture, or nothing
    # Of the processor, so that a busy machine fails no test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20, done.stdout
