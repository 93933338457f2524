"""Tests that import this build heads: they are skipped without the packages and meshes for it."""

import pytest

pytest.importorskip("embreex", reason="rendering heads needs '.[data]'")

from data_prep.parametric import assets
from spinmeround_jax.files import InputError

try:
    assets.assets_dir()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)
