"""The documents are true: snippets run, paths exist, every public name can be imported and says what it is."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build", "runs", ".pytest_cache", "node_modules"} & set(path.parts)
)
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


@pytest.mark.parametrize("package", ["lowrank_mvn", "sosvae"])
def test_public_names(package):
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"{package}.{name} has no docstring"


def test_readme_is_for_ten_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 750


def test_every_page_is_in_the_index():
    """Sphinx says so too, where the site is built."""
    docs = ROOT / "docs"
    listed = set(re.findall(r"^[\w/]+$", (docs / "index.md").read_text(encoding="utf-8"), re.M))
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    assert pages - {"index"} == listed


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_snippets_run(document, tmp_path, monkeypatch):
    """Every ```python block, in order and in one namespace."""
    snippets = re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.S | re.M)
    assert snippets or document.name != "README.md" or document.parent != ROOT
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(document), "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_paths_exist(document):
    """Paths in backticks that look like files or folders of the repository, and targets of links and pictures."""
    text = document.read_text(encoding="utf-8")
    quoted = re.findall(r"`([A-Za-z_.][\w./-]*(?:/|\.(?:py|md|toml|txt|png|csv)))`", text)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    for name in quoted + linked:
        if name.startswith(("runs/", ".venv", ".cache")) or name in GENERATED:
            continue
        assert any((base / name).exists() for base in (ROOT, document.parent, ROOT / "kernels")), name


# Files that a run directory holds; the trainer writes them, the repository does not.
GENERATED = {"config.json", "figures/", "checkpoints/", "kernels/__init__.py", "__init__.py", "sheet.png"}
# And what `sosvae evaluate` writes.
GENERATED |= {"likelihood.csv", "samples.csv", "temperatures.png"}
