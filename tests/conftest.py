import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from tests.support.paths import GOLDENS


@pytest.fixture(scope="session")
def golden():
    """`golden("cameras")` is the mapping of arrays in tests/goldens/cameras.npz."""
    return lambda name: np.load(GOLDENS / f"{name}.npz", allow_pickle=False)


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """Compiled programs of one module are of no use to the next, and a worker runs dozens of modules."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """For modules whose tests spend nearly all their time in compiling tiny networks."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
