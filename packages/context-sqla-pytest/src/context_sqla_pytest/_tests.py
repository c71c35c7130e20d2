"""What one test asks for, by its marker, its fixtures and the ini option, and in which event loop it runs."""

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from ._modes import Connects, Mode, Sessions, Stage

MARKER = "context_sqla"
SESSIONS = ("context_sqla_session", "context_sqla_sessions")
_SYNC = (
    "a test without an event loop of its own cannot share a transaction with the application, and has no session: make it "
    "'async def', or test with real commits: @pytest.mark.context_sqla('real')"
)


@dataclass(frozen=True)
class Asked:
    """What a test asks for.

    Args:
        stage: what all tests share.
        mode: how it works with the database.
        leak_check: whether it fails if it leaves something open; None for what the ini option says.
    """

    stage: Stage
    mode: Mode
    leak_check: bool | None


@asynccontextmanager
async def play(asked: Asked, connects: Connects) -> AsyncIterator[Sessions]:
    """Run a test as it asked, in its event loop."""
    async with asked.stage.play(asked.mode, connects, leak_check=asked.leak_check) as sessions:
        yield sessions


def asked_by(request: pytest.FixtureRequest, stage: Stage, default: Mode | None) -> Asked | None:
    """Return what a test asks for, None if it is nothing."""
    marker = request.node.get_closest_marker(MARKER)
    mode, leak_check = _arguments(marker) if marker is not None else (None, None)
    wants_session = any(name in request.fixturenames for name in SESSIONS)
    if mode is None and (marker is not None or wants_session or default is not None):
        mode = default or Mode.SHARED
        if mode is Mode.SHARED and is_sync(request.node) and marker is None and not wants_session:
            mode = Mode.REAL  # the default for all tests cannot hold for this one
    if mode is None or mode is Mode.OFF:
        return None
    if is_sync(request.node) and (mode is Mode.SHARED or wants_session):
        pytest.fail(f"context-sqla: {_SYNC}", pytrace=False)
    return Asked(stage, mode, leak_check)


def is_sync(item: pytest.Item) -> bool:
    """Return whether a test is no coroutine function."""
    function = getattr(item, "obj", None)
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return not inspect.iscoroutinefunction(function)


def loop_scope(item: pytest.Item) -> str:
    """Return the scope of the loop in which pytest-asyncio runs a test."""
    marker = item.get_closest_marker("asyncio")
    arguments = marker.kwargs if marker is not None else {}
    chosen = arguments.get("loop_scope") or arguments.get("scope")
    return str(chosen or _ini(item.config, "asyncio_default_test_loop_scope") or "function")


def _arguments(marker: pytest.Mark) -> tuple[Mode | None, bool | None]:
    def read(mode: str | None = None, *, leak_check: bool | None = None) -> tuple[Mode | None, bool | None]:
        return (Mode(mode) if mode is not None else None), leak_check

    try:
        return read(*marker.args, **marker.kwargs)
    except (TypeError, ValueError) as exc:
        raise pytest.UsageError(
            f"@pytest.mark.context_sqla takes a mode ('shared', 'real' or 'off') and leak_check=True or False: {exc}"
        ) from exc


def _ini(config: pytest.Config, name: str) -> object:
    try:
        return config.getini(name)
    except ValueError:  # a version of pytest-asyncio that does not have it yet
        return None
