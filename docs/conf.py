"""How Sphinx builds the documentation: `nox -s docs`. Nothing is fetched, and a warning is an error."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import desc_signature
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import diagrams  # noqa: E402

REPOSITORY = "https://github.com/context-sqla/context-sqla"

project = "context-sqla"
author = "the context-sqla authors"
version = release = tomllib.loads((ROOT / "packages/context-sqla/pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["changelog.d"]
highlight_language = "none"
pygments_dark_style = "github-dark"  # the theme's own underlines modules, as if they were links
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written, not "<function _unavailable>"
autodoc_typehints_format = "short"
default_role = "py:obj"  # `name` in a docstring is a link where the name is known, and code everywhere
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
smartquotes_action = "D"  # dashes, but no quotes: messages of errors are to be found as they are printed
suppress_warnings = ["ref.python"]  # `Rule` is the same type in every adapter; a link leads to one of them
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "context-sqla"
html_baseurl = "https://context-sqla.github.io/context-sqla/"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = True
html_show_copyright = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_exclude = ".linenos, .gp"

# What pages of this repository are called in the documentation; every other file outside docs/ is read on GitHub.
INCLUDED = {
    "README.md": "/index.md",
    "CHANGELOG.md": "/project/changelog.md",
    ".github/CONTRIBUTING.md": "/project/contributing.md",
    ".github/SECURITY.md": "/project/security.md",
}
_HIDDEN = re.compile(r"^<!---.*?^--->$\n?|^<!-- .*? -->$\n?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|mailto:|#|/)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```$\n?", re.MULTILINE | re.DOTALL)
# Types by their names: without them, a signature has what they stand for.
_ALIASES = {
    "Callable[[MutableMapping[str, Any], Callable[[], Awaitable[MutableMapping[str, Any]]], "
    "Callable[[MutableMapping[str, Any]], Awaitable[None]]], Awaitable[None]]": "ASGIApp",
    "Callable[[MutableMapping[str, Any]], Awaitable[None]]": "Send",
    "Callable[[], Awaitable[MutableMapping[str, Any]]]": "Receive",
    "Callable[[AsyncSession], Awaitable[Any]]": "BeforeCommitCallback",
    "Callable[[int], bool]": "Rule",
}
# Names of others that docstrings and signatures have, and where they are explained. An inventory would have to be fetched.
_ELSEWHERE = {
    "https://docs.python.org/3/library/": {
        "asyncio-exceptions.html": ["asyncio.CancelledError", "asyncio.TimeoutError"],
        "asyncio-task.html": ["asyncio.TaskGroup", "asyncio.gather", "asyncio.Task"],
        "exceptions.html": ["BaseException", "Exception", "KeyError", "RuntimeError", "TimeoutError", "TypeError", "ValueError"],
    },
    "https://docs.sqlalchemy.org/en/21/": {
        "core/engines.html": ["sqlalchemy.engine.URL"],
        "core/exceptions.html": ["sqlalchemy.exc.IntegrityError", "sqlalchemy.exc.InvalidRequestError"],
        "orm/extensions/asyncio.html": [
            f"sqlalchemy.ext.asyncio.{name}"
            for name in ("AsyncConnection", "AsyncEngine", "AsyncSession", "async_sessionmaker", "create_async_engine")
        ],
    },
}
_LINKS = {name: f"{site}{page}#{name}" for site, pages in _ELSEWHERE.items() for page, names in pages.items() for name in names}
CONTRACT = "explanation/contract"
_PROMISE = re.compile(r"\bP(?:1?[0-9]|20)[ab]?\b")
_NO_LINKS = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.raw, nodes.strong, desc_signature)
_KINDS = {"added": "Added", "changed": "Changed", "deprecated": "Deprecated", "removed": "Removed", "fixed": "Fixed"}


class Diagram(SphinxDirective):
    """Show a diagram of `diagrams.py`, drawn in the page so that it has the colours of light and dark; its body describes it."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the drawing, and its description for formats without drawings."""
        self.env.note_dependency(diagrams.__file__)
        svg = diagrams.draw(self.arguments[0], " ".join(self.content))
        return [nodes.raw("", f'<figure class="diagram">{svg}</figure>', format="html")]


def for_the_site(text: str, source: Path, *, included: bool = False) -> str:
    """Leave out what readers need not see, and let links to files outside of docs/ lead somewhere."""

    def link(match: re.Match[str]) -> str:
        target = (source.parent / match["path"]).resolve()
        anchor = match["anchor"] or ""
        if (own := INCLUDED.get(target.relative_to(ROOT).as_posix())) is not None:
            return f"]({own}{anchor})"
        if target.suffix == ".md" and target.is_relative_to(DOCS) and not target.is_relative_to(DOCS / "changelog.d"):
            return f"](/{target.relative_to(DOCS).as_posix()}{anchor})" if included else match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor})"

    return _LINK.sub(link, _HIDDEN.sub("", text))


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Prepare a page."""
    source[0] = for_the_site(source[0], DOCS / f"{docname}.md")


def read_included(app: Sphinx, path: Path, parent: str, source: list[str]) -> None:
    """Prepare a page of the repository that a page of the documentation includes."""
    real = (DOCS / path).resolve()
    if real.suffix == ".md":
        news = ""
        if real.name == "CHANGELOG.md":
            news = not_released()
            app.env.note_reread()  # fragments come and go
        source[0] = for_the_site(source[0], real, included=True) + news


def not_released() -> str:
    """Return the changelog's fragments, as a release would gather them."""
    parts = ["\n## Not released yet\n"]
    for kind, title in _KINDS.items():
        if found := sorted((DOCS / "changelog.d").glob(f"*.{kind}.md")):
            parts += [f"\n### {title}\n", *(f"* {one.read_text('utf-8').strip()}" for one in found)]
    return "\n".join(parts) + "\n" if len(parts) > 1 else ""


def name_types(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """Let a signature say the names of types; a protocol's says nothing."""
    if getattr(obj, "_is_protocol", False):
        return "", None
    for long, short in _ALIASES.items():
        # Names come with their modules, "~collections.abc.Callable", where Sphinx is to shorten them.
        pattern = re.sub(r"\w+", r"~?(?:\\w+\\.)*\g<0>\\b", re.sub(r"[\[\]]", r"\\\g<0>", long))
        signature = re.sub(pattern, short, signature) if signature else signature
        returns = re.sub(pattern, short, returns) if returns else returns
    return signature, returns


def hide_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, of which their class's docstring says more than "Alias for field number 0"."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def tidy_data(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let a value not be described by the docstring of its type, and set "alias of" apart from what the page says."""
    if what == "data" and lines:
        lines[:] = ["", *lines] if lines[0].startswith("alias of") else []


def link_elsewhere(app: Sphinx, env: Any, node: Any, content: nodes.TextElement) -> nodes.reference | None:
    """Link a name of another module of ours, of Python's or SQLAlchemy's, by its full name or by the last part of it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    kinds = ("class", "exception", "function", "data")
    ours = [(name, it) for name, it in env.domains.python_domain.objects.items() if it.objtype in kinds and not it.aliased]
    found = [(name, it) for name, it in ours if name.rsplit(".", 1)[-1] == target]
    if len(found) == 1:
        name, it = found[0]
        return make_refnode(app.builder, node.get("refdoc", ""), it.docname, it.node_id, content, name)
    names = [name for name in _LINKS if name == target or name.rsplit(".", 1)[-1] == target.rsplit(".", 1)[-1]]
    if len(names) != 1:
        return None
    link = nodes.reference("", "", internal=False, refuri=_LINKS[names[0]], reftitle=names[0])
    link.append(content)
    return link


def link_promises(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Let every "P4a" lead to that promise of the contract, where each has its number as its anchor."""
    if app.builder.format != "html":
        return
    if docname == CONTRACT:
        for strong in doctree.findall(nodes.strong):
            if match := _PROMISE.match(strong.astext()):
                strong.parent["ids"].append(match[0].lower())
    page = app.builder.get_relative_uri(docname, CONTRACT)
    for text in list(doctree.findall(nodes.Text)):
        parts = re.split(rf"({_PROMISE.pattern})", text.astext())
        if len(parts) > 1 and not any(isinstance(one, _NO_LINKS) for one in _around(text)):
            new: list[nodes.Node] = [nodes.Text(part) for part in parts]
            new[1::2] = [nodes.reference("", part, internal=True, refuri=f"{page}#{part.lower()}") for part in parts[1::2]]
            text.parent.replace(text, [one for one in new if one.astext()])


def _around(node: nodes.Node) -> Iterator[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node


def write_llms_txt(app: Sphinx, exception: Exception | None) -> None:
    """Write llms.txt: what this is, and every page with its first sentence, for readers that are programs."""
    if exception is not None or app.builder.name != "html":
        return
    index = (DOCS / "index.md").read_text("utf-8")
    summary = index.split("\n\n")[1].splitlines()[0]
    lines = ["# context-sqla", "", f"> {summary}", ""]
    lines += ["Async SQLAlchemy for web applications. Each page is here as Markdown too, at the address below.", ""]
    for contents in re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL):
        caption = re.search(r":caption: (.*)", contents)
        lines += [f"## {caption[1] if caption else 'Pages'}", ""]
        for name in re.findall(r"^[a-z][\w/-]+$", contents, re.MULTILINE):
            title = app.env.titles[name].astext()
            lines.append(f"- [{title}](_sources/{name}.md.txt): {_first_sentence(name)}")
        lines.append("")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines), "utf-8")


def _first_sentence(name: str) -> str:
    """Return the first line of a page's text, without its links."""
    text = _FENCE.sub("", _HIDDEN.sub("", (DOCS / f"{name}.md").read_text("utf-8")))
    lines = [line for line in text.splitlines()[1:] if re.match(r"[A-Za-z*`\[]", line)]
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", lines[0].lstrip("* ")) if lines else ""


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what is ours."""
    app.add_directive("diagram", Diagram)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-signature", name_types)
    app.connect("autodoc-skip-member", hide_fields)
    app.connect("autodoc-process-docstring", tidy_data)
    app.connect("missing-reference", link_elsewhere)
    app.connect("doctree-resolved", link_promises)
    app.connect("build-finished", write_llms_txt)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
