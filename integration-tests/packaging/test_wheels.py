"""What is in the wheels and sdists, and that each installs alone. DIST names a folder that has them already."""

import os
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from trove_classifiers import classifiers
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml"))

pytestmark = pytest.mark.parametrize("package", PACKAGES)


@pytest.fixture(name="dist", scope="session")
def _dist(tmp_path_factory):
    if given := os.environ.get("DIST"):
        return Path(given)
    dist = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--all-packages", "--out-dir", dist)
    return dist


def test_a_wheel_has_the_modules_the_marker_and_the_licence(dist, package):
    """Nothing is missing from a wheel, and nothing strays into it."""
    with zipfile.ZipFile(the_file(dist, package, "-py3-none-any.whl")) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    info = {name for name in names if ".dist-info/" in name}

    assert names - info == {str(path) for path in sources(package)}
    expected = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    if {"entry-points", "scripts"} & project(package).keys():
        expected.add("entry_points.txt")
    assert {name.split(".dist-info/")[1] for name in info} == expected
    assert f"{package.replace('-', '_')}/py.typed" in names


def test_an_sdist_has_what_builds_the_wheel(dist, package):
    """From an sdist alone the same wheel can be built."""
    with tarfile.open(the_file(dist, package, ".tar.gz")) as sdist:
        members = [member for member in sdist.getmembers() if not member.isdir()]
    names = {member.name.split("/", 1)[1] for member in members}

    assert all(member.isfile() for member in members), "the licence is a file here, not a link"
    assert names - {"pyproject.toml.orig"} == {
        *(f"src/{path}" for path in sources(package)),
        *("LICENSE", "PKG-INFO", "README.md", "pyproject.toml"),
    }


def test_metadata_shows_the_readme_and_the_licence(dist, package):
    """Named by neither, a readme or a licence is not shipped."""
    with zipfile.ZipFile(the_file(dist, package, "-py3-none-any.whl")) as wheel:
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()
        licence = wheel.read(next(name for name in wheel.namelist() if name.endswith("/LICENSE"))).decode()
    readme = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")

    assert readme.strip() in metadata
    assert not re.findall(r"\]\((?!https://|#)[^)]*\)", readme), "on PyPI a relative link leads nowhere"
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_metadata_is_what_pypi_accepts(dist, package):
    """An upload is refused for one unknown classifier, when the other distributions are already there."""
    with zipfile.ZipFile(the_file(dist, package, "-py3-none-any.whl")) as wheel:
        raw = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")))
    metadata = Metadata.from_email(raw, validate=True)

    assert (metadata.name, metadata.license_expression, metadata.license_files) == (package, "MIT", ["LICENSE"])
    assert metadata.description_content_type == "text/markdown"
    assert set(metadata.classifiers) <= classifiers
    assert len(metadata.summary) <= 120, "it is one line of a list of packages"


def test_each_installs_alone_and_imports(dist, package, tmp_path):
    """A distribution needs what it declares and nothing more."""
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    # uv remembers the siblings of an earlier build, which have the same version.
    fresh = ["--find-links", dist, *(f"--refresh-package={name}" for name in PACKAGES)]

    uv("venv", "--quiet", tmp_path / "venv")
    uv("pip", "install", "--quiet", "--python", python, *fresh, the_file(dist, package, "-py3-none-any.whl"))
    subprocess.run([python, "-I", "-W", "error", "-c", f"import {package.replace('-', '_')}"], cwd=tmp_path, check=True)


def project(package):
    """Return what the pyproject of a package says of it."""
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def sources(package):
    """Return what of a package is to be shipped, relative to its `src`: no cache that a tool left there."""
    src = ROOT / "packages" / package / "src"
    return {path.relative_to(src) for path in [*src.rglob("*.py"), *src.rglob("py.typed")]}


def the_file(dist, package, ending):
    (found,) = dist.glob(f"{package.replace('-', '_')}-[0-9]*{ending}")
    return found


def uv(*arguments):
    subprocess.run([find_uv_bin(), *arguments], cwd=ROOT, check=True)
