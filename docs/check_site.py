"""Check a built site: every link inside it leads somewhere, and every public name is in its inventory.

`python docs/check_site.py FOLDER`; nothing is fetched.
"""

import importlib
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PACKAGES = Path(__file__).parents[1] / "packages"
PUBLIC = [
    *sorted(path.parent.name for path in _PACKAGES.glob("*/src/*/__init__.py")),
    "context_sqla.adapters",
    "context_sqla.errors",
    "context_sqla.testing",
]
# Names of others, and names that have their place in another module of ours.
ELSEWHERE = {
    "context_sqla.adapters.AsyncSession",
    "context_sqla.adapters.BeforeCommitCallback",
    "context_sqla_pytest.capture_on_commit",
}


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.outside: list[str] = []  # what a browser would fetch from elsewhere to show the page
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.links.append(value)
                shows = tag in ("script", "img") or (tag == "link" and ("rel", "stylesheet") in attrs)
                if shows and urlsplit(value).scheme:
                    self.outside.append(value)


def broken_links(site: Path) -> Iterator[str]:
    """Return what is wrong with the links of a site."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        yield from (f"{path.relative_to(site)}: fetches {link}" for link in page.outside)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{path.relative_to(site)}: no file {link}"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{path.relative_to(site)}: no anchor {link}"


def missing_names(site: Path) -> Iterator[str]:
    """Return the public names that the reference has not."""
    lines = (site / "objects.inv").read_bytes().split(b"\n", 4)
    known = {line.split(" ", 1)[0] for line in zlib.decompress(lines[4]).decode().splitlines()}
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            places = {f"{module}.{name}"} | ({f"context_sqla.{name}"} if module == "context_sqla.errors" else set())
            if not places & (known | ELSEWHERE):
                yield f"{module}.{name} is not in the reference"


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    if wrong := [*broken_links(folder), *missing_names(folder)]:
        sys.exit("\n".join(wrong))
    print(f"{len(list(folder.rglob('*.html')))} pages: every link inside leads somewhere, every public name is there")
