"""What the README and CONTRIBUTING say is so: the examples run as they are printed, the files are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from mokus.demo import _renders, _save
from mokus.miniature import world
from mokus.pipeline import CORPUS_FILE, DEFAULTS_FILE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- not run[^>]*-->\n)?```(\w+)\n(.*?)```", re.DOTALL)
# Images are judged elsewhere (test_shipped.py).
FEW = {
    "learn": {"steps": 10, "prior_prompts": 8, "looks_share": 0.0},
    "edit": {"corpus": 16, "odd_references": 16, "preserve": 8, "exchanged": 8, "near_weight": 0.0},
}


def examples(*languages: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks that are there to be run, in order."""
    return [(kind, text) for left_out, kind, text in BLOCK.findall(README) if kind in languages and not left_out]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, that learns and gathers less by default."""
    weights, folder = Path(str(files("mokus.miniature").joinpath("weights"))), tmp_path_factory.mktemp("model")
    for path in weights.iterdir():
        if path.name not in (CORPUS_FILE, DEFAULTS_FILE):
            (folder / path.name).symlink_to(path)
    defaults = json.loads((weights / DEFAULTS_FILE).read_text(encoding="utf-8"))
    defaults |= {stage: defaults[stage] | few for stage, few in FEW.items()}
    (folder / DEFAULTS_FILE).write_text(json.dumps(defaults), encoding="utf-8")
    lines = (weights / CORPUS_FILE).read_text(encoding="utf-8").splitlines()
    (folder / CORPUS_FILE).write_text("\n".join(lines[:16]), encoding="utf-8")
    return folder


def run(language: str, text: str, place: Path, model: Path) -> str:
    """Run a block as it is printed, with `model` for the miniature, and return what it prints."""
    text = text.replace("mokus.load()", f"mokus.load({str(model)!r})")
    command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "MOKUS_MODEL": str(model)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_make_targets_are_there() -> None:
    targets = re.findall(r"^make (\S+)", "\n".join(text for _, text in examples("sh")), re.MULTILINE)
    assert targets == ["demo", "test"]
    if make := shutil.which("make"):
        subprocess.run([make, "-n", *targets], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_examples_run_as_printed(model: Path, tmp_path: Path) -> None:
    _save(_renders(world.SIZE), tmp_path / "photos")
    blocks = [(kind, text) for kind, text in examples("sh", "python") if not text.startswith("make ")]
    assert [kind for kind, _ in blocks] == ["python", "sh"]
    said = [run(kind, text, tmp_path, model) for kind, text in blocks]
    assert said[0].strip() == "sks toy"
    assert "sks toy" in said[1].splitlines()  # what `mokus ask` prints
    assert len(list(tmp_path.glob("beach-*.png"))) == 2 and len(list((tmp_path / "images").glob("*.png"))) == 8


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/log.md",
        "docs/editing.md",
        "docs/create.md",
        "docs/erase.md",
        "docs/packs_elsewhere.md",
        "docs/transfer.md",
        "docs/wise.md",
        "docs/studio.md",
        "docs/results/gpu_full_size.md",
    ],
)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    missing = [link for link in links if not _leads_somewhere((ROOT / name).parent, link)]
    assert not missing


def _leads_somewhere(folder: Path, link: str) -> bool:
    """To a file or, behind a #, to one of its headings."""
    file, _, heading = link.partition("#")
    if not (folder / file).exists():
        return False
    headings = re.findall(r"^#+ (.+)$", (folder / file).read_text(encoding="utf-8"), re.MULTILINE) if heading else []
    return not heading or heading in {re.sub(r"[^\w-]", "", text.lower().replace(" ", "-")) for text in headings}


def test_the_tree_names_every_file() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things are")[1].split("##")[0]
    there = {
        path.name
        for path in (ROOT / "src" / "mokus").rglob("*.py")
        if not {"editors", "methods", "metrics"} & {*path.parts}
    }
    assert there - {"__init__.py", "__main__.py"} <= set(re.findall(r"\w+\.py", tree))
    here = {path.name for folder in ("src", "benchmarks", "runs", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py\b", tree)) <= here | {"test_x.py"}
