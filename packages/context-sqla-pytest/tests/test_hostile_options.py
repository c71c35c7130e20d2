"""Options that nobody should write: each is a line of usage, and no password is repeated."""

import pytest
from context_sqla_pytest._databases import Databases
from context_sqla_pytest.plugin import _load
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest_plugins = ["pytester"]

SECRET = "hunter2"
PIECES = [
    "db1",
    ":",
    "5432",
    "/",
    "@",
    "[",
    "]",
    "?",
    "=",
    "%",
    " ",
    "\n",
    "²",
    "-1",
    "sqlite",
    "postgresql",
    "+asyncpg",
    "://",
    ".",
]
garbage = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
common = settings(derandomize=True, deadline=None, max_examples=200)


@common
@given(garbage)
@example("postgresql://db1:x/test")
@example("nothing")
def test_url_is_one_or_a_line_of_usage(url):
    """What is none is told as usage, without a traceback of SQLAlchemy's."""
    try:
        kind = Databases(url).kind
    except pytest.UsageError as error:
        assert "no URL" in str(error)
    else:
        assert kind


@common
@given(garbage, garbage)
@example("", ":x/test")
def test_url_in_an_error_has_no_password(before, after):
    """P20."""
    try:
        kind = Databases(f"{before}app:{SECRET}{after}").kind
    except pytest.UsageError as error:
        assert SECRET not in str(error)
        assert error.__suppress_context__
    else:
        assert SECRET not in kind


@common
@given(
    st.one_of(garbage, st.sampled_from(["", ":", ".x:y", "..:y", "os:nothing", "os", "nothing:x", "os:path:x", "context_sqla:"]))
)
@example(".x:y")
def test_name_of_a_connect_is_one_or_a_line_of_usage(name):
    """The option is named (P19)."""
    with pytest.raises(pytest.UsageError, match="context_sqla_connects"):
        _load(name, "context_sqla_connects")


def test_url_that_is_none_ends_the_run(project):
    """Before anything is imported: a line that names the option, and nothing of the URL."""
    project.tests("def test_it(): pass")

    result = project.run_apart("--context-sqla-url", f"postgresql://app:{SECRET}@db1:x/test")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--context-sqla-url" in str(result.stderr)
    assert SECRET not in str(result.stdout) + str(result.stderr)
