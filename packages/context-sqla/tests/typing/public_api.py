"""Types of the public names, as a user's type checker sees them: checked by mypy --strict, never run."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from contextvars import Token
from typing import Any, assert_type

from context_sqla import (
    BeforeCommitCallback,
    ContextSqlaError,
    DBConnect,
    PoolStatus,
    UnavailableError,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    committed_connects,
    db_context,
    db_session,
    get_db_session_from_context,
    init_db_session_ctx,
    is_context_initiated,
    is_in_doubt,
    keep_transaction,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
    unit_of_work,
)
from context_sqla.adapters import Phase, Policy, Unit, close_connects, explain, hidden_unit, retry_after_header
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession


class OwnSession(AsyncSession):
    """A user's own session class."""

    async def touch(self) -> int:
        return 1


def create_engine(host: str) -> AsyncEngine:
    return create_async_engine(f"postgresql+asyncpg://{host}/app")


def create_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


def create_own_maker(engine: AsyncEngine) -> async_sessionmaker[OwnSession]:
    return async_sessionmaker(engine, class_=OwnSession)


async def choose(connect: DBConnect[AsyncSession]) -> str | None:
    await connect.change_host("db1")
    return None


async def choose_nothing(connect: DBConnect[AsyncSession]) -> None:
    await connect.change_host("db1")


async def choose_own(connect: DBConnect[OwnSession]) -> str:
    return "db1"


# Connects

plain = DBConnect(create_engine, create_maker)
assert_type(plain, DBConnect[AsyncSession])
assert_type(DBConnect(create_engine, create_maker, "db1", choose), DBConnect[AsyncSession])
assert_type(DBConnect(create_engine, create_maker, "db1", choose_nothing), DBConnect[AsyncSession])
own = DBConnect(
    create_engine, create_own_maker, host="db1", before_create_session_handler=choose_own, name="own", cleanup_timeout=1
)
assert_type(own, DBConnect[OwnSession])

assert_type(DBConnect.from_url("sqlite+aiosqlite:///app.db"), DBConnect[AsyncSession])
assert_type(DBConnect.from_url("sqlite+aiosqlite:///app.db", session_class=OwnSession, name="own"), DBConnect[OwnSession])
sqlmodel = DBConnect.from_url("sqlite+aiosqlite:///app.db", session_class=SQLModelSession, engine_options={"echo": True})
assert_type(sqlmodel, DBConnect[SQLModelSession])

assert_type(DBConnect.from_sessionmaker(create_maker(create_engine("db1"))), DBConnect[AsyncSession])
assert_type(DBConnect.from_sessionmaker(create_own_maker(create_engine("db1")), name="own"), DBConnect[OwnSession])
assert_type(
    DBConnect.from_sessionmaker(async_sessionmaker(create_engine("db1"), class_=SQLModelSession)),
    DBConnect[SQLModelSession],
)


async def methods() -> None:
    assert_type(own.host, str | None)
    assert_type(own.name, str)
    assert_type(own.context_key, str)
    assert_type(await own.connect("db1"), None)
    assert_type(await own.change_host("db1"), None)
    assert_type(await own.session_maker(), async_sessionmaker[OwnSession])
    assert_type(await own.create_session(), OwnSession)
    assert_type(await own.close(), None)
    assert_type(await own.ping(timeout=1), None)
    assert_type(own.pool_status(), PoolStatus)
    assert_type(own.abort_host("db1"), int)
    status = own.pool_status()
    assert_type((status.host, status.size, status.checked_out), tuple[str | None, int, int])
    assert_type((status.overflow, status.waiting), tuple[int, int | None])


async def before_commit_of_own(session: OwnSession) -> None: ...


async def committed_of_own(session: OwnSession, host: str) -> None: ...


def engine_created(engine: AsyncEngine, host: str) -> None: ...


def hooks() -> None:
    own.before_commit.append(before_commit_of_own)
    own.committed.append(committed_of_own)
    own.engine_created.append(engine_created)


# Sessions


async def sessions() -> None:
    assert_type(await db_session(plain), AsyncSession)
    assert_type(await db_session(own), OwnSession)
    assert_type(await (await db_session(own)).touch(), int)
    assert_type(await db_session(sqlmodel), SQLModelSession)
    assert_type(await commit_db_session(own), None)
    assert_type(await rollback_db_session(sqlmodel), None)
    assert_type(await close_db_session(plain), None)
    assert_type(await keep_transaction(own), None)

    async with atomic_db_session(own) as session:
        assert_type(session, OwnSession)
    async with atomic_db_session(sqlmodel, "append", isolation_level="SERIALIZABLE", read_only=True) as with_options:
        assert_type(with_options, SQLModelSession)
    async with atomic_db_session(plain, current_transaction="raise") as by_keyword:
        assert_type(by_keyword, AsyncSession)
    atomic_db_session(plain, "comit")  # type: ignore[arg-type]  # only the four words

    async with new_non_ctx_session(own) as outside:
        assert_type(outside, OwnSession)
    async with new_non_ctx_atomic_session(sqlmodel) as atomic:
        assert_type(atomic, SQLModelSession)


# The life cycle by hand


async def refuse(session: AsyncSession) -> None: ...


callback: BeforeCommitCallback = refuse


async def by_hand() -> None:
    token = init_db_session_ctx()
    assert_type(token, Token[Any])
    init_db_session_ctx(force=True)
    assert_type(is_context_initiated(), bool)
    assert_type(await reset_db_session_ctx(token), None)
    assert_type(await reset_db_session_ctx(token, with_close=False), None)
    assert_type(get_db_session_from_context(own), OwnSession | None)
    assert_type(pop_db_session_from_context(own), OwnSession | None)
    assert_type(await commit_all_sessions(), None)
    assert_type(await commit_all_sessions(before_commit=refuse), None)
    assert_type(await rollback_all_sessions(), None)
    assert_type(await close_all_sessions(), None)
    assert_type(await auto_commit_by_status_code(200), None)
    assert_type(await auto_commit_by_status_code(200, before_commit=callback), None)
    put_db_session_to_context(own, OwnSession())
    put_db_session_to_context(own, AsyncSession())  # type: ignore[misc]  # not the connect's class


# After the commit


async def notify() -> str:
    return "done"


def forget() -> None: ...


def callbacks() -> None:
    on_commit(notify)
    on_commit(forget)
    on_commit(lambda: None, connect=own)
    on_commit(notify, connect=sqlmodel)
    on_commit(lambda one: None)  # type: ignore[arg-type, misc]  # a callback takes nothing


# Units


async def add(one: int, two: int = 2, *, name: str) -> str:
    return name * (one + two)


async def nothing() -> None: ...


async def units() -> None:
    assert_type(db_context(), AbstractAsyncContextManager[None, bool | None])
    async with db_context(before_commit=refuse):
        pass
    assert_type(await run_in_new_ctx(add, 1, name="a"), str)
    assert_type(await run_in_new_ctx(add, 1, 2, name="a"), str)
    assert_type(await run_in_new_ctx(nothing), None)
    await run_in_new_ctx(add, "1", name="a")  # type: ignore[arg-type]
    await run_in_new_ctx(add, 1)  # type: ignore[call-arg]
    await run_in_new_ctx(add, 1, names="a")  # type: ignore[call-arg]

    assert_type(await unit_of_work(retry=3)(add, 1, name="a"), str)
    assert_type(await unit_of_work()(nothing), None)
    await unit_of_work()(add, 1)  # type: ignore[call-overload]
    unit_of_work(3)  # type: ignore[call-arg]  # options by keyword


@unit_of_work(retry=3, isolation_level="SERIALIZABLE", read_only=True)
async def decorated(one: int, two: int = 2, *, name: str) -> str:
    return name * (one + two)


class Service:
    """A class with a decorated method."""

    @unit_of_work()
    async def write(self, name: str) -> int:
        return len(name)


async def decorated_calls() -> None:
    assert_type(await decorated(1, name="a"), str)
    await decorated(1)  # type: ignore[call-arg]
    await decorated("1", name="a")  # type: ignore[arg-type]
    pointer: Callable[..., Awaitable[str]] = decorated
    assert_type(await pointer(), str)
    assert_type(await Service().write("a"), int)
    await Service().write(1)  # type: ignore[arg-type]


# Errors


def questions(exc: BaseException) -> None:
    assert_type(is_in_doubt(exc), bool)
    assert_type(committed_connects(exc), tuple[str, ...])
    error: ContextSqlaError = UnavailableError("no master", retry_after=1.5)
    assert isinstance(error, UnavailableError)
    assert_type(error.retry_after, float | None)
    assert_type(retry_after_header(error), str)
    assert_type(explain(error), None)


# Tests of an application


async def helpers() -> None:
    async with rollback_session(own) as session, set_test_context(), put_savepoint_session_in_ctx(own, session) as mine:
        assert_type(session, OwnSession)
        assert_type(mine, OwnSession)
    async with set_test_context(auto_close=True) as opened:
        assert_type(opened, None)


# Adapters


async def adapter() -> None:
    unit = Unit.enter(Policy(should_commit=lambda status: status < 300, before_commit=refuse, label=str), "POST /users")
    assert_type(unit, Unit)
    assert_type(await unit.head(200), None)
    assert_type(await unit.end_of_body(), None)
    assert_type(await unit.close(ValueError()), None)
    unit.in_body()
    unit.in_body(beside=True)
    unit.disconnected()
    assert_type(unit.phase, Phase)
    assert_type(unit.joined, bool)
    assert_type(unit.runs_ahead, Callable[[Any], bool] | None)
    with hidden_unit() as hidden:
        assert_type(hidden, None)
    assert_type(await close_connects(plain, own, sqlmodel), None)
