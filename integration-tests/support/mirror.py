"""What a test and the processes that were forked from it have in common: the objects that its handlers can reach.

A handler is a closure of its test: it appends to lists, sets events and counts in variables of the test. Where handlers run in
forked processes, each has a copy of these objects; a ``Mirror`` in each process finds them in the same order, says what has
changed, and applies what another process says. Values cross by value; what cannot, a session or a task, stays where it is, and
``There`` stands for it.
"""

import asyncio
import dataclasses
import enum
import functools
import io
import pickle
import sys
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from context_sqla import DBConnect
from sqlalchemy.sql import ClauseElement

_EMPTY = object()
_SCALARS = (type(None), bool, int, float, str, bytes)
_PLAIN = (*_SCALARS, list, tuple, dict, set, frozenset, bytearray, complex, slice, type(Ellipsis))
#: Where the objects of tests come from; others, such as an engine, are not looked into.
_OURS = ("contract.", "support.scenario")

Change = tuple[int, str, Any]


class There:
    """Stands for an object of another process: its attributes and calls are asked for there."""

    def __init__(self, where: int, key: int, ask: Callable[..., Any], over: Callable[[], bool]) -> None:
        self.where = where
        self._key = key
        self._ask = ask
        self._over = over

    @property
    def is_over(self) -> bool:
        """Whether its process has ended."""
        return self._over()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __await__(self) -> Any:
        return self._ask("wait", self).__await__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, "__call__", args, kwargs)

    def __repr__(self) -> str:
        return f"<object {self._key} of worker {self.where}>"


class TaskThere(asyncio.Future[Any]):
    """Stands for a task of another process, and ends as it does."""

    def __init__(self, there: There) -> None:
        super().__init__()
        self.there = there
        self.add_done_callback(lambda _: self.cancelled() or self.exception())  # nobody may ask

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the task itself."""
        return bool(self.there.cancel())

    def ended(self, *, fine: bool, value: Any) -> None:
        """Do as the task did."""
        if isinstance(value, asyncio.CancelledError):
            super().cancel()
        elif not self.done():
            (self.set_result if fine else self.set_exception)(value)


class Mirror:
    """The objects that can be reached from the roots, the same in each process that is forked after this was made."""

    def __init__(self, roots: Iterable[object]) -> None:
        self.where = -1  # the test; workers are 0, 1, ...
        self.ask: Callable[[int], Callable[..., Any]] = cannot_ask
        self.over: Callable[[int], bool] = bool
        self.follow: Callable[[TaskThere], None] | None = None
        self._visited = list(_reachable(roots))
        self._known = {id(one): number for number, one in enumerate(self._visited)}
        self._changing = [(number, kind) for number, one in enumerate(self._visited) if (kind := _kind(one)) is not None]
        self._seen = {number: kind.copy(self._visited[number]) for number, kind in self._changing}
        self._kept: list[object] = []  # what others hold a There of
        self._theirs: dict[tuple[int, int], There | TaskThere] = {}

    def of(self, kind: type[Any]) -> list[Any]:
        """Return the objects of a class."""
        return [one for one in self._visited if isinstance(one, kind)]

    def changes(self) -> list[Change]:
        """Return what has changed here since the last call, except for what ``apply`` did."""
        found = []
        for number, kind in self._changing:
            one = self._visited[number]
            for name, value in kind.changes(self._seen[number], one):
                found.append((number, name, value))
            self._seen[number] = kind.copy(one)
        return found

    def apply(self, changes: Iterable[Change]) -> None:
        """Do what another process says; what is new here and was not told yet stays, behind it."""
        kinds = dict(self._changing)
        for number, name, value in changes:
            kind = kinds[number]
            self._seen[number] = kind.apply(self._visited[number], self._seen[number], name, value)

    def dumps(self, value: object) -> bytes:
        """Write a value for another process."""
        target = io.BytesIO()
        _Pickler(target, self).dump(value)
        return target.getvalue()

    def loads(self, data: bytes) -> Any:
        """Read a value of another process."""
        return _Unpickler(io.BytesIO(data), self).load()

    def name(self, value: object) -> tuple[Any, ...] | None:
        """Return how others call an object that does not cross by value; None for one that does."""
        if isinstance(value, TaskThere):
            value = value.there
        if isinstance(value, There):
            return (value.where, value._key, False)
        if id(value) in self._known:
            return (self._known[id(value)],)
        if _crosses(value) or (isinstance(value, BaseException) and id(type(value)) in self._known):
            return None
        key = next((key for key, one in enumerate(self._kept) if one is value), len(self._kept))
        if key == len(self._kept):
            self._kept.append(value)
        return (self.where, key, isinstance(value, asyncio.Task))

    def named(self, name: tuple[Any, ...]) -> Any:
        """Return the object that another process calls so."""
        if len(name) == 1:
            return self._visited[name[0]]
        where, key, is_task = name
        if where == self.where:
            return self._kept[key]
        if (where, key) not in self._theirs:
            there = There(where, key, self.ask(where), functools.partial(self.over, where))
            self._theirs[where, key] = there
            if is_task and self.follow is not None:
                self._theirs[where, key] = task = TaskThere(there)
                self.follow(task)
        return self._theirs[where, key]


def cannot_ask(where: int) -> Callable[..., Any]:
    """Refuse what another process would have to do."""

    def ask(*_: Any) -> Any:
        raise TypeError(f"this object is in process {where}")

    return ask


class _Pickler(pickle.Pickler):
    def __init__(self, target: io.BytesIO, mirror: Mirror) -> None:
        super().__init__(target, protocol=5)
        self._mirror = mirror

    def persistent_id(self, obj: Any) -> Any:
        return self._mirror.name(obj)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, BaseException):
            return NotImplemented
        said = "".join(traceback.format_exception(obj)) if obj.__traceback__ is not None else ""
        return _exception, (type(obj), obj.args, vars(obj), obj.__cause__, obj.__context__, obj.__suppress_context__, said)


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, mirror: Mirror) -> None:
        super().__init__(source)
        self._mirror = mirror

    def persistent_load(self, pid: Any) -> Any:
        return self._mirror.named(pid)


def _exception(
    cls: type[BaseException],
    args: tuple[Any, ...],
    attributes: dict[str, Any],
    cause: BaseException | None,
    context: BaseException | None,
    suppress: bool,
    said: str,
) -> BaseException:
    """Make an exception again, without its ``__init__``, which may want other arguments."""
    exc = cls.__new__(cls, *args)
    exc.args = args
    vars(exc).update(attributes)
    exc.__cause__, exc.__context__, exc.__suppress_context__ = cause, context, suppress
    if said:
        exc.said_there = said  # type: ignore[attr-defined]  # its traceback, which does not cross
    return exc


def _crosses(value: object) -> bool:
    """Return whether a value is made again in the other process: plain data, exceptions, what can be imported."""
    cls = type(value)
    if cls in _PLAIN or isinstance(value, ClauseElement):
        return True
    if isinstance(value, BaseException):
        return _is_importable(cls)
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return _is_importable(value)
    return _is_importable(cls) and (isinstance(value, enum.Enum | tuple | dict) or dataclasses.is_dataclass(value))


def _is_importable(value: Any) -> bool:
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _reachable(roots: Iterable[object]) -> Iterator[object]:
    """Yield all that the roots lead to, each once, always in the same order."""
    waiting, seen = deque(roots), set()
    while waiting:
        one = waiting.popleft()
        if isinstance(one, _SCALARS) or id(one) in seen:
            continue
        seen.add(id(one))
        children = _children(one)
        if children is not None:
            yield one
            waiting.extend(children)


def _children(one: Any) -> Sequence[object] | None:
    """What an object leads to; None for one that is nobody's business."""
    match one:
        case types.FunctionType():
            inner = (*(one.__closure__ or ()), *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values())
            return (*inner, *vars(one).values())
        case types.CellType():
            return () if _contents(one) is _EMPTY else (_contents(one),)
        case types.MethodType():
            return (one.__self__, one.__func__)
        case functools.partial():
            return (one.func, *one.args, *one.keywords.values())
        case list() | tuple() | deque():
            return tuple(one)
        case dict():
            return tuple(one.values())
        case set() | asyncio.Event() | asyncio.Queue() | BaseException():
            return ()
        case DBConnect():
            made = (one._engine_creator, one._session_maker_creator)
            return (one.before_create_session_handler, *made, one.engine_created, one.before_commit, one.committed)
        case type():
            return tuple(vars(one).values()) if "<locals>" in one.__qualname__ else None
    if (names := getattr(type(one), "SHARED", None)) is not None:
        return tuple(getattr(one, name) for name in names)
    if (wrapped := vars(one).get("_fn") if type(one).__module__ == "context_sqla._tasks" else None) is not None:
        return (wrapped,)  # what unit_of_work has decorated
    if type(one).__module__.startswith(_OURS) and hasattr(one, "__dict__"):
        # The attributes of a frozen dataclass do not change.
        return tuple(vars(one).values()) if dataclasses.is_dataclass(one) else (vars(one),)
    return None


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _same(one: object, other: object) -> bool:
    return one is other or (isinstance(one, _SCALARS) and type(one) is type(other) and one == other)


class _Kind:
    """How one kind of object is copied and compared."""

    def copy(self, one: Any) -> Any:
        return type(one)(one)

    def changes(self, seen: Any, one: Any) -> Iterator[tuple[str, Any]]:
        raise NotImplementedError

    def apply(self, one: Any, seen: Any, name: str, value: Any) -> Any:
        """Apply a change, and return what is seen of the object from now on."""
        raise NotImplementedError


class _List(_Kind):
    def copy(self, one: Any) -> Any:
        return list(one)

    def changes(self, seen: Any, one: Any) -> Iterator[tuple[str, Any]]:
        now = list(one)
        if len(now) < len(seen) or not all(map(_same, now, seen)):
            yield "all", now
        elif len(now) > len(seen):
            yield "append", now[len(seen) :]

    def apply(self, one: Any, seen: Any, name: str, value: Any) -> Any:
        late = list(one)[len(seen) :]
        seen = [*seen, *value] if name == "append" else list(value)
        one.clear()
        one.extend([*seen, *late])
        return seen


class _Dict(_Kind):
    def copy(self, one: Any) -> Any:
        return dict(one)

    def changes(self, seen: Any, one: Any) -> Iterator[tuple[str, Any]]:
        new = {key: value for key, value in one.items() if not _same(seen.get(key, _EMPTY), value)}
        if new:
            yield "update", new
        if gone := [key for key in seen if key not in one]:
            yield "remove", gone

    def apply(self, one: Any, seen: Any, name: str, value: Any) -> Any:
        for target in (one, seen):
            if name == "update":
                target.update(value)
            else:
                for key in value:
                    target.pop(key, None)
        return seen


class _Set(_Kind):
    def changes(self, seen: Any, one: Any) -> Iterator[tuple[str, Any]]:
        if one - seen:
            yield "update", one - seen
        if seen - one:
            yield "difference_update", seen - one

    def apply(self, one: Any, seen: Any, name: str, value: Any) -> Any:
        for target in (one, seen):
            getattr(target, name)(value)
        return seen


class _Cell(_Kind):
    def copy(self, one: Any) -> Any:
        return _contents(one)

    def changes(self, seen: Any, one: Any) -> Iterator[tuple[str, Any]]:
        now = _contents(one)
        if now is _EMPTY or _same(seen, now):
            return
        if type(now) is int and type(seen) is int:
            yield "add", now - seen  # several count in one variable
        else:
            yield "set", now

    def apply(self, one: Any, seen: Any, name: str, value: Any) -> Any:
        if name == "set":
            one.cell_contents = value
            return value
        one.cell_contents += value
        return seen + value


class _Event(_Kind):
    def copy(self, one: Any) -> Any:
        return one.is_set()

    def changes(self, seen: Any, one: Any) -> Iterator[tuple[str, Any]]:
        if one.is_set() != seen:
            yield "set", one.is_set()

    def apply(self, one: Any, seen: Any, name: str, value: Any) -> Any:
        (type(one).set if value else type(one).clear)(one)
        return value


_KINDS: Sequence[tuple[type[Any], _Kind]] = (
    (list, _List()),
    (deque, _List()),
    (dict, _Dict()),
    (set, _Set()),
    (types.CellType, _Cell()),
    (asyncio.Event, _Event()),
)


def _kind(one: object) -> _Kind | None:
    return next((kind for cls, kind in _KINDS if isinstance(one, cls)), None)
