"""Our networks against diffusers' and transformers' (see parity.py); `make test-slow` runs it."""

import importlib

import numpy as np
import pytest

from tests.support import reference_weights

WHY = "needs {}, of the extra [parity]"
torch = pytest.importorskip("torch", reason=WHY.format("torch"))
for package in ("diffusers", "transformers"):
    pytest.importorskip(package, reason=WHY.format(package))
parity = importlib.import_module("tests.parity")  # it imports all three


@pytest.mark.slow
def test_tiny_networks_agree(tmp_path):
    check(parity.compare(parity.tiny(), tmp_path))


@pytest.mark.slow
def test_full_size_networks_agree(tmp_path):
    report = parity.compare(parity.full(), tmp_path)
    check(report)
    assert report.convert_gib < 12


def check(report):
    print(parity.table(report))
    assert len(report.rows) == 7
    for row in report.rows:
        assert row.std > 0.1, row  # else small errors would say nothing
        assert row.float32 < parity.LIMIT and row.exported < parity.LIMIT, row
        # Rounding of 8 bits (bfloat16) and 11 bits (float16) that adds up over the layers.
        assert 0 < row.bfloat16_rms < 0.1, row
        assert 0 < row.float16_weights < 0.05, row


@pytest.mark.slow
@torch.no_grad()
def test_sharing_attention_changes_what_diffusers_computes():
    """So that the comparison over eight views tells joint attention from plain attention."""
    size = parity.tiny()
    state = {
        name: torch.from_numpy(reference_weights.tensor(name, tuple(shape)))
        for name, shape in size.shapes.items()
    }
    unet = parity.reference_unet(state, size.config)
    inputs = parity.draw_inputs(size)
    context = torch.from_numpy(inputs["context"]).expand(parity.VIEWS, -1, -1)
    x, c_noise = parity.channels_first(inputs["x"]), torch.full((parity.VIEWS,), 0.1)
    plain = unet(x, c_noise, context).sample.numpy()
    parity.share_attention(unet)
    joint = unet(x, c_noise, context).sample.numpy()
    assert np.abs(joint - plain).max() > 100 * parity.LIMIT * plain.std()
