import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden():
    """`golden("cameras")` is the mapping of arrays in tests/goldens/cameras.npz."""
    folder = pathlib.Path(__file__).parent / "goldens"
    return lambda name: np.load(folder / f"{name}.npz", allow_pickle=False)
