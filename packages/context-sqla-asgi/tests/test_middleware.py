"""Which scopes get a unit of work, and what becomes of errors that nobody answered."""

import asyncio
import gc
import weakref

import pytest
from context_sqla import ContextNotInitiatedError, UnavailableError, db_context, db_session, is_context_initiated
from context_sqla.adapters import Phase
from context_sqla_asgi import SCOPE_KEY, ASGIHTTPDBSessionMiddleware, CommitPoint, request_label, setup
from sqlalchemy.exc import IntegrityError

OK = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"end"}


async def test_request_that_asks_for_no_session_opens_nothing(ledger, server):
    """No engine, no connection, no session (P1)."""

    async def app(scope, receive, send):
        await send(OK)
        await send(END)

    await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert ledger.db.pool_status().size == 0


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_other_scopes_see_no_unit(ledger, server, kind):
    """A server may have been started inside a unit; neither websockets nor the lifespan see it (P11)."""
    seen = []

    async def app(scope, receive, send):
        seen.append(is_context_initiated())
        with pytest.raises(ContextNotInitiatedError, match="db_context"):
            await db_session(ledger.db)
        async with db_context():
            await ledger.write("a")

    async with db_context():
        await ASGIHTTPDBSessionMiddleware(app)({"type": kind}, server.receive, server.send)
        seen.append(is_context_initiated())

    assert seen == [False, True]
    assert ledger.names() == "a"


async def test_inherited_unit_is_not_joined(ledger, server):
    """A request opens its own unit, whatever context it runs in, and leaves that as it was (P12)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await send(END)

    async with db_context():
        session = await db_session(ledger.db)
        log = await server.call(ASGIHTTPDBSessionMiddleware(app))
        assert await db_session(ledger.db) is session

    assert log == ["start 200 [a]", "body end [a]"]


async def test_request_that_passes_twice_has_one_unit(ledger, server):
    """The same request is recognised by its scope (P12)."""
    wires = []

    async def app(scope, receive, send):
        wires.append(scope[SCOPE_KEY])
        await ledger.write("a")
        await send(OK)
        await ledger.write("b")
        await send(END)

    async def mount(scope, receive, send):
        wires.append(scope[SCOPE_KEY])
        await ledger.write("c")
        await setup(app)(dict(scope), receive, send)

    log = await server.call(setup(mount))

    assert log == ["start 200 [a c]", "body end [a b c]"]
    assert wires[0] is wires[1] is not None


async def test_scope_is_left_as_it_was(ledger, server):
    """Nothing of a request stays in its scope: a server may use it again."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)
        assert scope[SCOPE_KEY].unit.phase is Phase.HANDLER

    await server.call(setup(app))

    assert SCOPE_KEY not in scopes[0]


class Witness:
    """Something in a scope that can be watched."""


async def test_request_leaves_no_cycle(ledger, server):
    """A request without an error is freed by reference counting alone."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(weakref.ref(scope["state"]))
        await send(OK)
        await send(END)

    gc.disable()
    try:
        await server.call(setup(app), state=Witness())
        assert scopes[0]() is None
    finally:
        gc.enable()


async def test_unit_knows_the_request_by_name(ledger, server):
    """Log lines name the request (P16)."""
    labels = []

    async def app(scope, receive, send):
        labels.append(scope[SCOPE_KEY].unit.label())

    await server.call(setup(app), method="POST", path="/users")

    assert labels == ["POST /users"]


async def test_label_has_the_names_of_parameters():
    """Where the framework has noted them in the scope (P16)."""
    scope = {"method": "GET", "path": "/users/1/pets/1/2", "path_params": {"user": 1, "pet": "2"}}

    assert request_label(scope) == "GET /users/{user}/pets/{user}/{pet}"


async def test_unavailable_database_is_503(ledger, server):
    """Without a head, `UnavailableError` is answered; the unit rolls back."""

    async def app(scope, receive, send):
        await ledger.write("a")
        raise UnavailableError("no master", retry_after=2.5)

    sent = []

    async def send(message):
        sent.append(message)

    server.send = send
    await server.call(setup(app))

    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"]) == {
        b"content-type": b"text/plain; charset=utf-8",
        b"retry-after": b"3",
    }
    assert ledger.names() == ""


async def test_database_that_is_unavailable_at_the_commit_is_503(ledger, server):
    """The default answer holds for the commit too."""

    async def refuse(session):
        raise UnavailableError("no master")

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await send(END)

    log = await server.call(setup(app, before_commit=refuse))

    assert log == ["start 503 []", "body Service Unavailable []"]


async def test_database_that_is_unavailable_in_the_body_breaks_it(ledger, server):
    """After the head there is no other answer (P5)."""

    async def app(scope, receive, send):
        await send(OK)
        raise UnavailableError("no master")

    with pytest.raises(UnavailableError):
        await server.call(setup(app))

    assert server.log == ["start 200 []", "raised UnavailableError []"]


def stack(app, between, answer=None):
    point = CommitPoint(app)
    if answer is not None:
        point.answer = answer
    return ASGIHTTPDBSessionMiddleware(between(point))


async def test_commit_point_decides_further_in(ledger, server):
    """Middleware between the two parts sees the head after the commit, and cannot move it (P4b)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await ledger.write("b")
        await send(END)
        await ledger.write("c")

    def between(app):
        async def middleware(scope, receive, send):
            async def sender(message):
                server.log.append(f"between [{ledger.names()}]")
                if message["type"] == "http.response.body":
                    await send(OK)
                    await send(message)

            await app(scope, receive, sender)

        return middleware

    log = await server.call(stack(app, between))

    assert log == ["between [a]", "between [a b]", "start 200 [a b]", "body end [a b]"]
    assert ledger.names() == "a b c"


async def test_commit_point_without_a_unit_does_nothing(ledger, server):
    """It may stand in an application that opened none."""

    async def app(scope, receive, send):
        assert not is_context_initiated()
        await send(OK)
        await send(END)

    log = await server.call(CommitPoint(app))

    assert log == ["start 200 []", "body end []"]


async def test_commit_error_is_answered_at_the_commit_point(ledger, server):
    """The adapter's answer goes through all middleware, and its background work commits (P4b, P6)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        await send(OK)
        await send(END)

    async def answer(error, scope, wire):
        assert error is wire.failed
        await wire.send(OK | {"status": 409})
        await wire.send(END)
        await ledger.write("b")
        return True

    log = await server.call(stack(app, lambda app: app, answer))

    assert log == ["start 409 []", "body end []"]
    assert ledger.names() == "b"


async def test_commit_error_without_an_answer_goes_on(ledger, server):
    """It is raised from the commit point to what stands around (P4b)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        await send(OK)

    def between(app):
        async def middleware(scope, receive, send):
            try:
                await app(scope, receive, send)
            except IntegrityError:
                await send(OK | {"status": 500})
                await send(END)
                raise

        return middleware

    with pytest.raises(IntegrityError):
        await server.call(stack(app, between))

    assert server.log == ["start 500 []", "body end []", "raised IntegrityError []"]


def forgiving(app):
    """End a body well whatever became of it, as `BaseHTTPMiddleware` does."""

    async def middleware(scope, receive, send):
        try:
            await app(scope, receive, send)
        except Exception:
            await send(END)

    return middleware


async def test_body_that_failed_is_not_ended_by_middleware(ledger, server):
    """The end that middleware makes up is withheld, and the body's own error raised (P5)."""

    async def app(scope, receive, send):
        await send(OK)
        await ledger.write("a")
        raise LookupError

    with pytest.raises(LookupError):
        await server.call(stack(app, forgiving))

    assert server.log == ["start 200 []", "raised LookupError []"]


async def test_body_whose_commit_failed_is_not_ended_by_middleware(ledger, server):
    """The same for its final commit (P5)."""

    async def app(scope, receive, send):
        await send(OK)
        await ledger.write_orphan("a")
        await send(END)

    with pytest.raises(IntegrityError):
        await server.call(stack(app, forgiving))

    assert server.log == ["start 200 []", "raised IntegrityError []"]


@pytest.mark.parametrize(
    ("status", "log"),
    [(200, ["raised LookupError []"]), (500, ["start 500 []", "body end []", "raised LookupError []"])],
)
async def test_head_after_its_body_failed(ledger, server, status, log):
    """Middleware that held the head back may still tell the truth, and nothing else (P4)."""

    async def app(scope, receive, send):
        await send(OK)
        raise LookupError

    def between(app):
        async def middleware(scope, receive, send):
            async def hold(message):
                pass

            try:
                await app(scope, receive, hold)
            except LookupError:
                await send(OK | {"status": status})
                await send(END)
                raise

        return middleware

    with pytest.raises(LookupError):
        await server.call(stack(app, between))

    assert server.log == log


async def test_failing_work_after_the_body_does_not_break_it(ledger, server):
    """Middleware that is still sending the body goes on, and may swallow the error; the work rolls back (P6)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await send(END)
        await ledger.write("b")
        raise LookupError

    def between(app):
        async def middleware(scope, receive, send):
            held = []

            async def hold(message):
                held.append(message)

            try:
                await app(scope, receive, hold)
            except LookupError:
                for message in held:
                    await send(message)

        return middleware

    log = await server.call(stack(app, between))

    assert log == ["start 200 [a]", "body end [a]"]
    assert ledger.names() == "a"


async def test_middleware_that_answers_by_itself_decides(ledger, server):
    """A head that never came by the commit point is decided further out (P3)."""

    async def app(scope, receive, send):
        raise AssertionError

    def between(app):
        async def middleware(scope, receive, send):
            await ledger.write("a")
            await send(OK)
            await ledger.write("b")
            await send(END)

        return middleware

    log = await server.call(stack(app, between))

    assert log == ["start 200 [a]", "body end [a b]"]


async def test_middleware_that_replaces_the_response_does_not_finish_its_body(ledger, server):
    """The end of another body is not the end of this one, which was given up (P5)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await ledger.write("b")
        await send(END | {"more_body": True})

    def between(app):
        async def middleware(scope, receive, send):
            async def drop(message):
                pass

            await app(scope, receive, drop)
            await send(OK | {"status": 304})
            await send(END)

        return middleware

    log = await server.call(stack(app, between))

    assert log == ["start 304 [a]", "body end [a]"]
    assert ledger.names() == "a"


def _in_a_task(app):
    async def middleware(scope, receive, send):
        await asyncio.create_task(app({**scope, "inner": True}, receive, send))

    return middleware


@pytest.mark.parametrize(
    ("stack", "inner"),
    [
        (lambda app, outer: outer(app), False),
        (lambda app, outer: outer(CommitPoint(app)), False),
        (lambda app, outer: outer(_in_a_task(CommitPoint(app))), True),
        (lambda app, outer: setup(_in_a_task(outer(app))), True),
    ],
    ids=["one-part", "two-parts", "a-task-between", "mounted"],
)
async def test_task_of_the_request_is_told_from_those_that_it_starts(ledger, server, stack, inner):
    """By the outer part, or further in where that knows better; and by which request."""
    seen = []

    def outer(app):
        return ASGIHTTPDBSessionMiddleware(app, runs_ahead=lambda unit: not unit.is_at_mark())

    async def app(scope, receive, send):
        unit = scope[SCOPE_KEY].unit

        async def ask():
            return unit.runs_ahead(unit)

        seen.extend([await ask(), await asyncio.create_task(ask()), await ask(), unit.request.get("inner", False)])

    await server.call(stack(app, outer))

    assert seen == [False, True, False, inner]
