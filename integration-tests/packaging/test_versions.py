"""One release train: one version, sibling ranges that follow it, and a lock that is up to date."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from context_sqla import _drivers
from packaging.requirements import Requirement
from packaging.version import Version
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "packages").glob("*/pyproject.toml"))
}
VERSIONS = {name: project["project"]["version"] for name, project in PROJECTS.items()}
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def test_all_distributions_have_one_version():
    """One tag releases all."""
    assert len(set(VERSIONS.values())) == 1, VERSIONS


@pytest.mark.parametrize("name", PROJECTS)
def test_siblings_are_required_in_the_range_of_this_version(name):
    """Never ==, which ties users' hands, and never nothing, which mixes releases."""
    version = Version(VERSIONS[name])
    upper = f"<{version.major + 1}" if version.major else f"<0.{version.minor + 1}"
    lower = f">={version.major}.{version.minor}" + ("" if version.major else ".0")
    if version.is_prerelease:
        lower = f">={version}"  # a candidate is below the number of its release
    siblings = [requirement for requirement in requirements(name) if requirement.name in PROJECTS]

    assert siblings or name == "context-sqla"
    assert {frozenset(str(sibling.specifier).split(",")) for sibling in siblings} <= {frozenset({lower, upper})}


def test_the_core_depends_on_sqlalchemy_alone():
    """Whoever installs the core gets SQLAlchemy and nothing else; every sibling is an extra, for whom one name is easier."""
    project = PROJECTS["context-sqla"]["project"]

    assert [Requirement(text).name for text in project["dependencies"]] == ["sqlalchemy"]
    assert {extra: [Requirement(text).name for text in texts] for extra, texts in project["optional-dependencies"].items()} == {
        name.removeprefix("context-sqla-"): [name] for name in PROJECTS if name != "context-sqla"
    }


@pytest.mark.parametrize("name", PROJECTS)
def test_metadata_is_complete(name):
    """What PyPI shows of each distribution: readme, licence, Pythons, typing, links."""
    project = PROJECTS[name]["project"]
    classifiers = project["classifiers"]

    assert PROJECTS[name]["build-system"]["requires"] == ["uv_build>=0.13,<0.14"]
    assert (project["license"], project["license-files"], project["readme"]) == ("MIT", ["LICENSE"], "README.md")
    assert project["requires-python"] == f">={PYTHONS[0]}"
    assert [f"Programming Language :: Python :: {python}" for python in PYTHONS] == [
        text for text in classifiers if text.startswith("Programming Language :: Python :: 3.")
    ]
    assert "Typing :: Typed" in classifiers
    assert {"Changelog", "Documentation", "Homepage", "Issues", "Source"} <= project["urls"].keys()
    assert (ROOT / "packages" / name / "LICENSE").resolve() == ROOT / "LICENSE"


def test_the_lock_is_up_to_date():
    """Everybody tests the same versions."""
    assert uv("lock", "--check") == 0


def test_errors_name_the_lowest_drivers_that_are_tested():
    """Who installs what a `DriverError` says has a driver that keeps the promises."""
    tested = suite_requirements()
    named = {name: Requirement(text) for name, text in _drivers._PACKAGES.items() if name in tested}

    assert named.keys() == {"aiosqlite", "asyncpg", "psycopg"}
    assert named == {name: tested[name] for name in named}


@pytest.mark.parametrize("name", PROJECTS)
def test_extras_bring_drivers_that_are_tested(name):
    """Who installs `context-sqla-hosts[asyncpg]` has a driver that keeps the promises, too."""
    tested = suite_requirements()
    extras = [
        Requirement(text) for texts in PROJECTS[name]["project"].get("optional-dependencies", {}).values() for text in texts
    ]

    assert [str(extra) for extra in extras if extra.name not in PROJECTS and str(extra) != str(tested.get(extra.name))] == []


def test_the_installed_distributions_agree():
    """Neither `uv lock` nor `uv sync` looks at the ranges of siblings: this does."""
    assert uv("pip", "check", "--python", sys.executable) == 0


def suite_requirements():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    return {Requirement(text).name: Requirement(text) for text in groups["test"]}


def requirements(name):
    project = PROJECTS[name]["project"]
    texts = [*project["dependencies"], *sum(project.get("optional-dependencies", {}).values(), [])]
    return [Requirement(text) for text in texts]


def uv(*arguments):
    return subprocess.run([find_uv_bin(), *arguments], cwd=ROOT, check=False).returncode
