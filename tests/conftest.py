"""Options of the test run."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--shape-check", action="store_true", help="enforce the package's shape annotations (jaxtyping and beartype)")


def pytest_configure(config):
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings
    if config.getoption("--shape-check"):
        from jaxtyping import install_import_hook

        install_import_hook("unet_course", "beartype.beartype")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
