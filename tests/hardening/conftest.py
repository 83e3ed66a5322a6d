"""What the suite shares: the count of its cases, and a pico model whose edits are quick."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from mokus import pipeline
from mokus.pipeline import Model

from ..conftest import CASES, SIZE

# The same examples in every run, so that a red run is red again. MOKUS_FUZZ=1000 looks further, at random.
_more = int(os.environ.get("MOKUS_FUZZ", "0"))
settings.register_profile(
    "mokus", deadline=None, derandomize=not _more, database=None, print_blob=True, max_examples=_more or 40,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("mokus")


def case(kind: str) -> None:
    """Count one case: an input, a point of failure, a hostile file, a cycle."""
    CASES[kind] += 1


# The smallest learning and editing that goes the whole way.
QUICK = {
    "size": SIZE, "steps": 2, "true_cfg_scale": 1.0,
    "learn": {
        "steps": 2, "rank": 1, "alpha": 1.0, "prior_weight": 0.0, "place_share": 0.0, "looks_share": 0.0,
        "checkpoint_every": 1, "prior_prompts": 1, "prior_steps": 1,
    },
    "edit": {"editor": "ultraedit", "answer_weight": 0.0, "least_alignment": 0.0},
    "editors": {
        "ultraedit": {"layers": [1], "modules": ["mlp.down_proj"], "eta": 0.005, "steps": 1},
        "least_drift": {
            "layers": [1], "modules": ["mlp.down_proj"], "steps": 1, "corpus": 10, "odd_references": 2, "preserve": 2,
            "near_misses": 1, "exchanged": 1, "rivals": 1,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def quick_folder(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with the quickest defaults."""
    copy = tmp_path_factory.mktemp("quick") / "pico"
    shutil.copytree(pico_folder, copy)
    (copy / pipeline.DEFAULTS_FILE).write_text(json.dumps(QUICK), encoding="utf-8")
    return copy


@pytest.fixture(scope="session")
def quick(quick_folder: Path) -> Model:
    """... loaded."""
    return pipeline.load(quick_folder, device="cpu")


@pytest.fixture(scope="session")
def one_photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one photo."""
    folder = tmp_path_factory.mktemp("photos")
    Image.new("RGB", (40, 40), (200, 90, 30)).save(folder / "a.png")
    return folder
