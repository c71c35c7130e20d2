"""Several commit points around one request: the innermost that sees the head decides, and each passes on what failed inside."""

import asyncio

import pytest
from context_sqla_asgi import SCOPE_KEY, ASGIHTTPDBSessionMiddleware, CommitPoint
from sqlalchemy.exc import IntegrityError

OK = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"end"}


def stack(app, *between, points=CommitPoint):
    """Put a commit point around the application, and one around each middleware, the innermost first."""
    app = points(app)
    for middleware in between:
        app = points(middleware(app))
    return ASGIHTTPDBSessionMiddleware(app)


def passing(app):
    async def middleware(scope, receive, send):
        await app(scope, receive, send)

    return middleware


def swallowing(app):
    async def middleware(scope, receive, send):
        try:
            await app(scope, receive, send)
        except Exception:
            pass

    return middleware


def ending(app):
    """End the body well whatever became of it."""

    async def middleware(scope, receive, send):
        try:
            await app(scope, receive, send)
        except Exception:
            await send(END)

    return middleware


def answering(status, work=None):
    """Answer errors before the head, as a framework does."""

    def make(app):
        async def middleware(scope, receive, send):
            try:
                await app(scope, receive, send)
            except IntegrityError:
                if work is not None:
                    await work()
                await send(OK | {"status": status})
                await send(END)

        return middleware

    return make


async def test_innermost_point_decides_and_finishes(ledger, server):
    """Once: the others pass the messages on (P4, P5, P6)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await ledger.write("b")
        await send(END)
        await ledger.write("c")

    log = await server.call(stack(app, passing, passing))

    assert log == ["start 200 [a]", "body end [a b]"]
    assert ledger.names() == "a b c"


async def test_nearest_wire_is_in_the_scope(server):
    """Everybody finds the one around it, and the one of before when the inner part has ended, however it ended."""
    seen = []

    async def app(scope, receive, send):
        seen.append(scope[SCOPE_KEY])
        raise asyncio.CancelledError if len(seen) > 5 else LookupError

    def note(app):
        async def middleware(scope, receive, send):
            seen.append(scope[SCOPE_KEY])
            try:
                await app(scope, receive, send)
            finally:
                seen.append(scope[SCOPE_KEY])

        return middleware

    whole = stack(app, note, note)
    with pytest.raises(LookupError):
        await server.call(whole)
    with pytest.raises(asyncio.CancelledError):
        await server.call(whole)

    for first, second, third, fourth, fifth in (seen[:5], seen[5:]):
        assert (first, second) == (fifth, fourth)
        assert len({id(first), id(second), id(third)}) == 3
        assert first.unit is second.unit is third.unit


@pytest.mark.parametrize(("status", "rows"), [(200, "b c"), (409, "c")])
async def test_failed_commit_is_answered_between_two_points(ledger, server, status, rows):
    """The point further out decides about that answer, finishes its body, and lets its background work commit (P4b, P6)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        await send(OK)
        await send(END)

    async def answer_with_work():
        await ledger.write("b")

    def late(app):
        async def middleware(scope, receive, send):
            await app(scope, receive, send)
            await ledger.write("c")

        return middleware

    log = await server.call(stack(app, answering(status, answer_with_work), late))

    assert log == [f"start {status} [{rows[:-2]}]", f"body end [{rows[:-2]}]"]
    assert ledger.names() == rows


async def test_failed_commit_of_the_answer_to_a_failed_commit(ledger, server):
    """It is an error like the first, and may be answered further out (P4b)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        await send(OK)

    log = await server.call(stack(app, answering(200, lambda: ledger.write_orphan("b")), answering(500)))

    assert log == ["start 500 []", "body end []"]
    assert ledger.names() == ""


async def test_each_point_may_answer(ledger, server):
    """The innermost is asked first; one that does not answer leaves it to the next, whose wire has not failed itself (P4b)."""
    asked = []

    class Asked(CommitPoint):
        @staticmethod
        async def answer(error, scope, wire):
            asked.append((type(error), wire is scope[SCOPE_KEY], wire.head))
            if len(asked) < 2:
                return False
            await wire.send(OK | {"status": 409})
            await wire.send(END)
            return True

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        await send(OK)

    log = await server.call(stack(app, passing, passing, points=Asked))

    assert asked == [(IntegrityError, True, None)] * 2
    assert log == ["start 409 []", "body end []"]


@pytest.mark.parametrize("between", [(ending, passing), (passing, ending), (ending, ending), (swallowing, ending)])
@pytest.mark.parametrize("fails", ["body", "commit"])
async def test_body_that_failed_never_ends_well(ledger, server, between, fails):
    """Wherever the middleware stands that ends it, and although it swallows the error (P5)."""
    error = LookupError if fails == "body" else IntegrityError

    async def app(scope, receive, send):
        await send(OK)
        await (ledger.write if fails == "body" else ledger.write_orphan)("a")
        if fails == "body":
            raise LookupError
        await send(END)

    with pytest.raises(error):
        await server.call(stack(app, *between))

    assert server.log == ["start 200 []", f"raised {error.__name__} []"]


@pytest.mark.parametrize("between", [(passing, passing), (swallowing, passing), (passing, swallowing), (swallowing, swallowing)])
async def test_failed_work_after_the_body_rolls_back(ledger, server, between):
    """Whoever swallows its error, and whatever is written on the way out (P6)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await send(END)
        await ledger.write("b")
        raise LookupError

    try:
        await server.call(stack(app, *between))
    except LookupError:
        assert swallowing not in between

    assert server.log[:2] == ["start 200 [a]", "body end [a]"]
    assert ledger.names() == "a"


async def test_error_of_the_middleware_before_its_head_is_no_failed_body(ledger, server):
    """An exception that a point further in has passed on leaves the answer to the next free (P3)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        raise LookupError

    def answer(app):
        async def middleware(scope, receive, send):
            try:
                await app(scope, receive, send)
            except LookupError:
                await send(OK | {"status": 404})
                await send(END)

        return middleware

    log = await server.call(stack(app, passing, answer))

    assert log == ["start 404 []", "body end []"]
    assert ledger.names() == ""


async def test_middleware_between_answers_by_itself(ledger, server):
    """What never reached the innermost point is decided by the next one (P3, P5)."""

    async def app(scope, receive, send):
        raise AssertionError

    def answer(app):
        async def middleware(scope, receive, send):
            await ledger.write("a")
            await send(OK)
            await ledger.write("b")
            await send(END)

        return middleware

    log = await server.call(stack(app, answer, passing))

    assert log == ["start 200 [a]", "body end [a b]"]


async def test_client_that_leaves_is_noticed_by_all(ledger, server):
    """And rolls the body back once (P5)."""

    async def app(scope, receive, send):
        await send(OK)
        await ledger.write("a")
        server.gone.set()
        await receive()
        await send(END)

    await server.call(stack(app, passing, passing))

    assert ledger.names() == ""


async def test_application_in_an_application_has_points_of_its_own(ledger, server):
    """With a scope of its own, as those that mount have it: what fails inside is known outside (P12)."""

    async def app(scope, receive, send):
        await send(OK)
        await ledger.write_orphan("a")
        await send(END)

    inner = stack(app, ending)

    async def mount(scope, receive, send):
        await inner({**scope, "path": "/inner"}, receive, send)

    with pytest.raises(IntegrityError):
        await server.call(stack(mount, ending))

    assert server.log == ["start 200 []", "raised IntegrityError []"]
