"""Where the repository and the stored reference values are."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
