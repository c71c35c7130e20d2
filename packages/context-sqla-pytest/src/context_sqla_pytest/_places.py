"""Where in the user's own code something was done: the innermost line that belongs to no library."""

import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from greenlet import getcurrent  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Where:
    """A line of code."""

    path: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{_shown(self.path)}:{self.line} in {self.function}"

    @property
    def source(self) -> str:
        """The line itself."""
        return linecache.getline(self.path, self.line).strip()


def caller() -> Where | None:
    """Return the line of the user's code that is being executed, None where no frame is the user's."""
    for frame in _frames():
        root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        path = frame.f_code.co_filename
        if not (_is_library(root) or "site-packages" in path or path.startswith("<")):
            return Where(path, frame.f_lineno, frame.f_code.co_name)
    return None


def _is_library(root: str) -> bool:
    return root.startswith(("context_sqla", "__main__")) or root in sys.stdlib_module_names  # __main__ is pytest


def _frames() -> Iterator[FrameType]:
    """Yield the frames from here outwards, out of SQLAlchemy's greenlet into the coroutine that waits for it."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    greenlet: Any = getcurrent()
    while frame is not None:
        yield frame
        frame = frame.f_back
        if frame is None and greenlet.parent is not None:
            greenlet = greenlet.parent
            frame = greenlet.gr_frame


def _shown(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
