"""Sphinx builds `docs/` with it: `make docs`. Nothing is fetched, and a warning is an error.

Three directives write what would otherwise go stale: `{public} PACKAGE` the reference of every public name, `{options}`
the trainer's options, `{presets}` the presets.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

from sphinx.util.docutils import SphinxDirective

import lowrank_mvn
from sosvae import config as configuration
from sosvae import presets

project, author = "sosvae", "the authors of sosvae"
version = release = lowrank_mvn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"sosvae {version}"
html_copy_source = False
html_extra_path = ["editor-demo.html"]
pygments_style, pygments_dark_style = "friendly", "native"
myst_heading_anchors = 3
default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes, units
napoleon_use_rtype = False
exclude_patterns = ["_build"]

ROOT = Path(__file__).parent.parent


def with_options(text: str) -> str:
    """`--` begins an option here, and is no dash."""
    return re.sub(r"(?<![`\w-])(--[\w.-]*\w)", r"`\1`", text)


class Written(SphinxDirective):
    """A directive whose content is written here, as Markdown."""

    optional_arguments = 1

    def text(self) -> list[str]:
        raise NotImplementedError

    def run(self):
        return self.parse_text_to_nodes("\n".join(self.text()), allow_section_headings=True)


class Public(Written):
    """Everything in `__all__` of a package, classes first."""

    def text(self):
        module = importlib.import_module(self.arguments[0])
        things = {name: getattr(module, name) for name in module.__all__}
        for title, kind in (("Classes", inspect.isclass), ("Functions", inspect.isfunction)):
            directive = "autoclass" if kind is inspect.isclass else "autofunction"
            yield f"\n## {title}\n"
            for name in sorted(n for n, thing in things.items() if kind(thing)):
                yield f"```{{eval-rst}}\n.. {directive}:: {self.arguments[0]}.{name}"
                if directive == "autoclass":
                    yield "   :members:"
                fields = getattr(things[name], "__dataclass_fields__", getattr(things[name], "_fields", ()))
                if fields:  # the docstring has them, or the table of options
                    yield f"   :exclude-members: {', '.join(fields)}"
                yield "```\n"


class Options(Written):
    """A table for each section of the configuration, from the texts under its fields, which are the command's help."""

    def text(self):
        tree = ast.parse(Path(configuration.__file__).read_text(encoding="utf-8"))
        for section in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Config"):
            prefix = section.name.removesuffix("Config").lower()
            yield f"\n### `--{prefix}`: `{section.name}`\n"
            yield from ("| option | default | |", "|---|---|---|")
            for field, text in zip(section.body, section.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    name = field.target.id.replace("_", "-")
                    help_ = " ".join(ast.literal_eval(text.value).split()).replace("|", "\\|")
                    yield f"| `--{prefix}.{name}` | `{ast.unparse(field.value)}` | {with_options(help_)} |"


class Presets(Written):
    def text(self):
        yield from ("| preset | |", "|---|---|")
        yield from (f"| `{name}` | {with_options(about)} |" for name, (about, _) in presets.PRESETS.items())


def shapes(app, what, name, thing, options, lines):
    """A shape such as [B, K, *spatial] is no emphasis."""
    lines[:] = [re.sub(r"(?<!`)(\[[^]`]*\*[^]`]*\])(?!`)", r"``\1``", line) for line in lines]


def demo(app, document, source):
    """A link to the editor's page opens it, with its session; Sphinx would make a download of it."""
    source[0] = re.sub(r"\[([^]]+)\]\((editor-demo\.html[^)]*)\)", r'<a href="\2">\1</a>', source[0])


def setup(app):
    app.connect("source-read", demo)
    app.connect("autodoc-process-docstring", shapes)
    for name, directive in (("public", Public), ("options", Options), ("presets", Presets)):
        app.add_directive(name, directive)
