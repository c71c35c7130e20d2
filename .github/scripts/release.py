"""Set one version everywhere, or check it against a tag.

python .github/scripts/release.py 0.2.0            set it in every package, with the siblings' ranges; then run `uv lock`
python .github/scripts/release.py --check v0.2.0   fail unless every package has the tag's version
python .github/scripts/release.py --notes v0.2.0   print the changelog's section of that version
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYPROJECTS = sorted((ROOT / "packages").glob("*/pyproject.toml"))


def main(arguments: list[str]) -> None:
    """Do what the arguments ask for."""
    match arguments:
        case ["--check", tag]:
            check(tag.removeprefix("v"))
        case ["--notes", tag]:
            print(notes(tag.removeprefix("v")))
        case [version] if re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
            for path in PYPROJECTS:
                path.write_text(bumped(path.read_text(encoding="utf-8"), version), encoding="utf-8")
        case _:
            sys.exit(__doc__)


def check(version: str) -> None:
    """End with an error that names the packages of another version."""
    others = [path.parent.name for path in PYPROJECTS if tomllib.loads(path.read_text("utf-8"))["project"]["version"] != version]
    if others:
        sys.exit(f"not at version {version}: {', '.join(others)}")


def notes(version: str) -> str:
    """Return what the changelog says of this version."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(version)} .*?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None:
        sys.exit(f"CHANGELOG.md has no section for {version}")
    return section[1].strip()


def bumped(text: str, version: str) -> str:
    """Return a pyproject with this version, and with the ranges that siblings have for it."""
    major, minor = map(int, version.split(".")[:2])
    lower = f"{major}.{minor}" if major else f"0.{minor}.0"
    if re.search("[a-z]", version):
        lower = version  # a candidate comes before the release, and is below its number
    wanted = f">={lower}," + (f"<{major + 1}" if major else f"<0.{minor + 1}")
    text = re.sub(r'^version = ".*"$', f'version = "{version}"', text, count=1, flags=re.MULTILINE)
    return re.sub(r'"(context-sqla[a-z-]*)>=[^"]*"', rf'"\1{wanted}"', text)


if __name__ == "__main__":
    main(sys.argv[1:])
