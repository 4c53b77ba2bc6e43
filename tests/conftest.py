"""What every test shares. Data that is not part of the project comes from `SELFREWARD_TEST_DATA`."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported: many short products, few cores

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels then run on CPU tensors, for their values


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The directory of real test data; tests that need it are skipped where it is not set."""
    root = os.environ.get("SELFREWARD_TEST_DATA")
    if not root:
        pytest.skip("SELFREWARD_TEST_DATA is not set; it names the directory with the real test data")
    if not Path(root).is_dir():
        pytest.skip(f"SELFREWARD_TEST_DATA names {root}, which is not a directory")
    return Path(root)
