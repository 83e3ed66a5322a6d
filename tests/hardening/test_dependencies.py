"""What is installed is what is pinned; the list of it is made; and the page about security says where to write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import case

ROOT = Path(__file__).parents[2]
INSTALLERS = {"pip", "setuptools", "wheel"}  # they bring themselves
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if (text := line.split("#")[0].strip())
    for pin in [Requirement(text)]
}


def needed() -> dict[str, str]:
    """Everything that the project and its extras need here, however far down: name -> installed version."""
    todo = [(Requirement(text), "") for text in PROJECT["dependencies"]]
    todo += [(Requirement(text), "") for texts in PROJECT["optional-dependencies"].values() for text in texts]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted, extra = todo.pop()
        name = canonicalize_name(wanted.name)
        if name == "mokus" or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        for more in ("", *wanted.extras):
            if (name, more) in seen:
                continue
            seen.add((name, more))
            try:
                installed = distribution(name)
            except PackageNotFoundError:  # of an extra that is not installed here
                continue
            found[name] = installed.version
            todo += [(Requirement(text), more) for text in installed.requires or []]
    return found


def test_every_installed_dependency_is_pinned() -> None:
    unpinned = [
        f"{name}=={version}" for name, version in needed().items() if name not in PINS and name not in INSTALLERS
    ]
    assert len(needed()) > 60 and not unpinned, f"add to constraints.txt: {' '.join(sorted(unpinned))}"
    case("dependencies")


def test_pins_are_exact_and_of_this_project_alone() -> None:
    for name, pin in PINS.items():
        case("dependencies")
        assert [spec.operator for spec in pin.specifier] == ["=="] and not pin.url, (
            f"{name} is not pinned to one version"
        )


def test_every_range_allows_its_pin() -> None:
    texts = [*PROJECT["dependencies"], *(text for some in PROJECT["optional-dependencies"].values() for text in some)]
    for wanted in map(Requirement, texts):
        if (name := canonicalize_name(wanted.name)) != "mokus":
            version = next(iter(PINS[name].specifier)).version
            assert wanted.specifier.contains(version, prereleases=True), f"{wanted} leaves out the pinned {version}"


def test_the_bill_of_materials_names_every_dependency(tmp_path: Path) -> None:
    """`make sbom`, in CycloneDX's JSON; without the network."""
    pytest.importorskip("cyclonedx_py", reason="of the extra `audit`")
    file = tmp_path / "sbom.json"
    subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", ROOT / "pyproject.toml", "--no-validate",
         "--of", "JSON", "-o", file, sys.executable], check=True, capture_output=True,
    )  # fmt: skip
    bill = json.loads(file.read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    missing = {name: version for name, version in needed().items() if listed.get(name) != version}
    assert not missing
    case("dependencies")


def test_the_page_about_security_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert re.search(r"## Report", text) and "make audit" in text and "make sbom" in text
