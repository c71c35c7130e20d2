"""What users and other people's adapters may import, and that each of it is documented."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from context_sqla import errors

ROOT = Path(__file__).parents[2]
PUBLIC_MODULES = [
    "context_sqla",
    "context_sqla.adapters",
    "context_sqla.errors",
    "context_sqla.testing",
    "context_sqla_aiohttp",
    "context_sqla_asgi",
    "context_sqla_fastapi",
    "context_sqla_litestar",
    "context_sqla_quart",
    "context_sqla_sanic",
    "context_sqla_starlette",
]
# The first word of a docstring says what happens, to the one who makes it happen.
NOT_IMPERATIVE = re.compile(r"(A|An|Class|Function|Helper|It|Method|The|This|[A-Z][a-z]+(?<!s)s)\b")


def public_objects():
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__.startswith("context_sqla"):
                yield f"{module_name}.{name}", value
                yield from public_methods(f"{module_name}.{name}", value)


def public_methods(path, value):
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        function = getattr(
            member, "__func__", member
        )  # the values of properties are nouns: ruff's D102 asks for their docstrings
        if not name.startswith("_") and inspect.isfunction(function):
            yield f"{path}.{name}", function


PUBLIC_OBJECTS = dict(public_objects())
ERRORS = [getattr(errors, name) for name in errors.__all__ if inspect.isclass(getattr(errors, name))]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_all_is_sorted(name):
    """A public module says what it offers, in the order in which people look: constants, classes, functions."""
    names = importlib.import_module(name).__all__

    assert list(names) == sorted(set(names), key=lambda name: (not name.isupper(), name))


@pytest.mark.parametrize("name", [name for name in PUBLIC_MODULES if "." not in name])
def test_a_package_shows_nothing_else(name):
    """What `import package` shows of ours is what it offers."""
    package = importlib.import_module(name)
    visible = {
        key
        for key, value in vars(package).items()
        if not key.startswith("_") and not inspect.ismodule(value) and getattr(value, "__module__", "").startswith("context_sqla")
    }

    assert visible <= set(package.__all__)


@pytest.mark.parametrize("name", PUBLIC_OBJECTS)
def test_every_public_name_says_what_it_does(name):
    """The first line of a docstring is one sentence; a function's is imperative: the effect as the caller sees it."""
    value = PUBLIC_OBJECTS[name]
    first_line = inspect.cleandoc(value.__doc__ or "").split("\n")[0]

    assert first_line.endswith((".", ":")), first_line or "no docstring"
    assert not (inspect.isroutine(value) and NOT_IMPERATIVE.match(first_line)), first_line


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_a_section_in_the_reference(error):
    """The docs list every error with its cause and its remedy (P19)."""
    reference = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")

    assert re.search(rf"^#+ .*\b{error.__name__}\b", reference, re.MULTILINE)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_in_the_one_tree(error):
    """Whoever catches ContextSqlaError catches all that we raise by ourselves (P19)."""
    assert issubclass(error, errors.ContextSqlaError)
