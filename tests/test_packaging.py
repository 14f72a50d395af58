"""The wheel, the requirements and the promise that importing costs nothing and looks for no device."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lowrank_mvn
import sosvae

ROOT = Path(__file__).parent.parent
VERSION = lowrank_mvn.__version__


def run(*command, **options):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of what is installed
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_archive_and_wheel_install_into_an_empty_environment(tmp_path):
    """Both packages, `py.typed`, tables of launches and nothing else; importable with what its requirements bring.

    The wheel is built from the source archive, which therefore has all that an installation needs.
    """
    source = tmp_path / "source"
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in files:
        if name and (ROOT / name).is_file():  # a copy, so that building leaves nothing in the checkout
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = tmp_path.glob(f"sosvae-{VERSION}.tar.gz")
    with tarfile.open(archive) as held:
        parts = {member.name.partition("/")[2] for member in held}
    compiled = [path for suffix in ("cpp", "h") for path in (ROOT / "kernels" / "lowrank_mvn").rglob(f"*.{suffix}")]
    assert {path.relative_to(ROOT).as_posix() for path in compiled} <= parts
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", archive)
    (wheel,) = (tmp_path / "dist").glob(f"sosvae-{VERSION}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lowrank_mvn", "sosvae"}
    for package in ("lowrank_mvn", "sosvae"):
        assert f"{package}/py.typed" in names
        folder = ROOT / ("kernels" if package == "lowrank_mvn" else ".") / package
        modules = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert modules <= set(names)
    metadata = [name for name in names if ".dist-info/" in name]
    allowed = re.compile(
        r".*\.py|.*/py\.typed|lowrank_mvn/_cpu\.[^/]+|lowrank_mvn/device/tuned/[^/]+\.json|sosvae/editor/static/page\.(html|css|js)"
        r"|sosvae/paper/edits/[^/]+\.json"
    )
    assert "lowrank_mvn/_cpu.abi3.so" in names or not os.environ.get("CI")
    assert all(allowed.fullmatch(name) for name in set(names) - set(metadata))
    assert any(name.endswith("LICENSE") for name in metadata)

    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel)
    code = "import lowrank_mvn, sosvae, torch; print(lowrank_mvn.__file__); lowrank_mvn.LowRankMultivariateNormal"
    assert "empty" in run(python, "-W", "error", "-c", code, cwd=tmp_path)


def test_one_version():
    """In the packages, in what is built of them, and in the citation."""
    assert lowrank_mvn.__version__ == sosvae.__version__ == VERSION
    assert f'version="{VERSION}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_requirements():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for word in ("torch", "triton", "numpy"):
        assert f'"{word}>=' in text
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "torch==2.13.0" in constraints
    assert "triton==3.7.1" in constraints
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_looks_for_no_device_and_brings_no_heavy_module():
    code = """
import sys, torch
def caught(*args, **kwargs): raise AssertionError("looked for a device")
for name in ("is_available", "device_count", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, caught)
import lowrank_mvn, sosvae
heavy = "triton", "torch.distributed.tensor", "matplotlib", "tensorboard", "tyro", "PIL", "mlxtend"
print([name for name in heavy if name in sys.modules])
"""
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_no_gpu_is_an_error_only_where_one_is_asked_for():
    code = """
import torch, lowrank_mvn
D = lowrank_mvn.LowRankMultivariateNormal(torch.zeros(4), torch.ones(4, 1), torch.ones(4))
print(D.log_prob(torch.zeros(4)).item() < 0)
"""
    assert run(sys.executable, "-c", code).strip() == "True"
