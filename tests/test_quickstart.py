"""docs/quickstart.ipynb: its cells run in order, with tiny settings."""

import json
import sys

import pytest

from spinmeround_jax import checkpoints
from tests.support import needs_heads  # noqa: F401
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = {
    "VIEWS": 8,
    "SPLATS": {"steps": 4, "count": 200, "lpips": 0.0},
    "HEADS": ["--subjects=2", "--held-out=1", "--size=16", "--views=12", "--samples=1"],
    "TRAINING": [
        "--config.model.image_size=16",
        "--config.model.views=4",
        "--config.model.unet.model_channels=16",
        "--config.model.unet.channel_mult=(1,)",
        "--config.model.unet.attention_levels=()",
        "--config.model.unet.joint_levels=()",
        "--config.autoencoder_training.steps=2",
        "--config.autoencoder_training.crop=16",
        "--config.autoencoder_training.lpips_weight=0.0",
        "--config.held_out.heads=1",
        "--config.optimizer.batch_size=2",
        "--config.stages[0].steps=2",
        "--config.stages[1].steps=2",
    ],
}


def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(ROOT / "docs")  # where Jupyter starts it
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {"__name__": "quickstart"}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {**TINY, "OUT": tmp_path}
    assert names["code"] == 0
    assert names["heads"].images.shape == (1, 8, 16, 16, 3)  # of the model trained here
    assert checkpoints.load_model(tmp_path / "run" / "model").config.views == 4
    for file in ("views/index.html", "splats/viewer.html", "run/report.html"):
        assert (tmp_path / file).is_file()
