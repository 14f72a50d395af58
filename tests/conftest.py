"""What several test files share."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a device that torch can see; without one they are skipped, and say so."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
