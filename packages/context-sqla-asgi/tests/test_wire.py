"""The exact order of messages and commits."""

import asyncio

import pytest
from context_sqla import db_context, db_session, run_in_new_ctx
from context_sqla_asgi import ASGIHTTPDBSessionMiddleware, CommitPoint
from sqlalchemy.exc import IntegrityError

OK = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"end"}


def head(status: int = 200, *headers: tuple[bytes, bytes], **more) -> dict:
    return {"type": "http.response.start", "status": status, "headers": list(headers)} | more


def chunk(body: bytes, **more) -> dict:
    return {"type": "http.response.body", "body": body, "more_body": True} | more


async def test_commit_comes_before_the_head(ledger, server):
    """No byte of the head leaves before the commit has succeeded (P4)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await send(END)

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 [a]", "body end [a]"]


@pytest.mark.parametrize(
    ("status", "rows"), [(100, ""), (204, "a"), (302, "a"), (304, "a"), (399, "a"), (400, ""), (404, ""), (503, "")]
)
async def test_status_decides(ledger, server, status, rows):
    """Below 400 commits, from 400 on rolls back, and an informational head decides nothing (P3)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(head(status))
        await send({"type": "http.response.body"})

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == [f"start {status} [{rows}]", f"body  [{rows}]"]


async def test_should_commit_replaces_the_rule(ledger, server):
    """`should_commit` alone decides (P3)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(head(404))
        await send(END)

    log = await server.call(ASGIHTTPDBSessionMiddleware(app, should_commit=lambda status: status == 404))

    assert log == ["start 404 [a]", "body end [a]"]


async def test_informational_head_leaves_the_decision_open(ledger, server):
    """Early hints leave at once; the final status decides (P3)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send({"type": "http.response.early_hint", "links": []})
        await send(head(103))
        await send(head(409))
        await send(END)

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["early_hint  []", "start 103 []", "start 409 []", "body end []"]


async def test_body_is_committed_before_its_last_message(ledger, server):
    """What a stream writes is committed before its end leaves, and none of it before (P5)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await ledger.write("b")
        await send(chunk(b"1"))
        await ledger.write("c")
        await send(chunk(b"2"))
        await send(END)

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 [a]", "body 1+ [a]", "body 2+ [a]", "body end [a b c]"]


async def test_chunk_that_completes_the_declared_length_is_the_last(ledger, server):
    """A client that has all it was promised may leave; the commit comes before that (P5)."""

    async def app(scope, receive, send):
        await send(head(200, (b"Content-Length", b"4")))
        await ledger.write("a")
        await send(chunk(b"12"))
        await send(chunk(b"34"))
        server.gone.set()
        assert (await receive())["type"] == "http.disconnect"
        await send(chunk(b"", more_body=False))

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", "body 12+ []", "body 34+ [a]", "body  [a]"]


@pytest.mark.parametrize("value", [b"", b"-1", b"four"])
async def test_length_that_is_no_number_is_left_to_the_server(ledger, server, value):
    """A header that cannot be read changes nothing; the mark of the last message decides."""

    async def app(scope, receive, send):
        await send(head(200, (b"x", b"y"), (b"content-length", value)))
        await ledger.write("a")
        await send(chunk(b"1234"))
        await send(END)

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", "body 1234+ []", "body end [a]"]


async def test_declared_length_of_nothing(ledger, server):
    """With a Content-Length of 0 the first message of the body is the last (P5)."""

    async def app(scope, receive, send):
        await send(head(200, (b"content-length", b"0")))
        await ledger.write("a")
        await send(chunk(b""))

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", "body + [a]"]


async def test_answer_to_a_head_request(ledger, server):
    """HEAD is decided and ended as any other request."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(head(200, (b"content-length", b"10")))
        await ledger.write("b")
        await send({"type": "http.response.body"})

    log = await server.call(ASGIHTTPDBSessionMiddleware(app), method="HEAD")

    assert log == ["start 200 [a]", "body  [a b]"]


async def test_path_send_is_the_last_message(ledger, server):
    """A file that the server sends by itself ends the body (P5)."""

    async def app(scope, receive, send):
        await send(OK)
        await ledger.write("a")
        await send({"type": "http.response.pathsend", "path": "/file"})

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", "pathsend  [a]"]


@pytest.mark.parametrize(("count", "rows"), [(2, "a"), (None, "")])
async def test_zero_copy_send_counts(ledger, server, count, rows):
    """A piece of a file counts with its length; where that is unknown, the mark decides (P5)."""

    async def app(scope, receive, send):
        await send(head(200, (b"content-length", b"2")))
        await ledger.write("a")
        await send({"type": "http.response.zerocopysend", "file": 0, "count": count, "more_body": True})
        await send({"type": "http.response.zerocopysend", "file": 0})

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", f"zerocopysend + [{rows}]", "zerocopysend  [a]"]


async def test_trailers_come_after_the_commit(ledger, server):
    """The body's end is committed before its last message; trailers pass."""

    async def app(scope, receive, send):
        await send(head(trailers=True))
        await ledger.write("a")
        await send(END)
        await send({"type": "http.response.trailers", "headers": []})

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", "body end [a]", "trailers  [a]"]


async def test_work_after_the_body_is_a_unit_of_its_own(ledger, server):
    """What runs after the last message commits when it has succeeded (P6)."""

    async def app(scope, receive, send):
        await send(OK)
        await send(END)
        await ledger.write("a")

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", "body end []"]
    assert ledger.names() == "a"


async def test_failing_work_after_the_body_rolls_back(ledger, server):
    """What runs after the last message and fails leaves nothing, and the response is not touched (P6)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await send(END)
        await ledger.write("b")
        raise LookupError

    with pytest.raises(LookupError):
        await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert server.log == ["start 200 [a]", "body end [a]", "raised LookupError [a]"]


async def test_exception_rolls_back_and_is_raised_unchanged(ledger, server):
    """The application's exception is the one that the server gets (P3)."""
    error = LookupError("mine")

    async def app(scope, receive, send):
        await ledger.write("a")
        raise error

    with pytest.raises(LookupError) as caught:
        await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert caught.value is error
    assert server.log == ["raised LookupError []"]


async def test_application_that_never_answers_rolls_back(ledger, server):
    """Without a head nothing is decided, and nothing committed (P3)."""

    async def app(scope, receive, send):
        await ledger.write("a")

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == []
    assert ledger.names() == ""


async def test_body_without_an_end_rolls_back(ledger, server):
    """An application that returns in the middle of a body has not finished it (P5)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await ledger.write("b")
        await send(chunk(b"1"))

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 [a]", "body 1+ [a]"]
    assert ledger.names() == "a"


async def test_client_that_leaves_in_the_middle_of_a_body_rolls_it_back(ledger, server):
    """A disconnect ends an unfinished body; work after it is committed by itself (P5, P6)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await ledger.write("b")
        await send(chunk(b"1"))
        server.gone.set()
        await receive()
        await ledger.write("c")

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 [a]", "body 1+ [a]"]
    assert ledger.names() == "a c"


async def test_body_in_a_task_of_its_own_is_told_from_what_follows(ledger, server):
    """What such a body still writes when its client has left is rolled back, and the work that follows it is not (P5, P6)."""
    wrote = asyncio.Event()

    async def body(send):
        await send(chunk(b"1"))
        await server.gone.wait()
        await ledger.write("b")
        wrote.set()
        await asyncio.Event().wait()

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        task = asyncio.create_task(body(send))
        await asyncio.sleep(0)
        server.gone.set()
        await receive()
        await wrote.wait()
        task.cancel()
        await asyncio.wait((task,))
        await ledger.write("c")

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 [a]", "body 1+ [a]"]
    assert ledger.names() == "a c"


async def test_work_that_follows_a_body_behind_middleware_is_told_from_it(ledger, server):
    """Where middleware runs the rest in a task of its own, that one is the request's: what follows the body is no body (P6)."""

    async def listen(receive):
        await receive()

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await send(chunk(b"1"))
        server.gone.set()
        await asyncio.create_task(listen(receive))
        await ledger.write("b")

    async def middleware(scope, receive, send):
        await asyncio.create_task(CommitPoint(app)(scope, receive, send))

    await server.call(ASGIHTTPDBSessionMiddleware(middleware))

    assert ledger.names() == "a b"


@pytest.mark.parametrize("asks", ["before the head", "after it"])
async def test_body_whose_client_leaves_before_its_first_piece_is_told_from_what_follows(ledger, server, asks):
    """A body in a task of its own is known by its head, or by the session that it asks for, before its first piece (P5, P6)."""
    began = asyncio.Event()

    async def body(send):
        await send(OK)
        if asks == "after it":
            await ledger.write("b")
        began.set()
        await server.gone.wait()
        await ledger.write("late")

    async def app(scope, receive, send):
        if asks == "before the head":
            await ledger.write("a")
        task = asyncio.create_task(body(send))
        await began.wait()
        server.gone.set()
        await receive()
        await task
        await ledger.write("c")

    await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert ledger.names() == ("a c" if asks == "before the head" else "c")


async def test_unit_around_a_piece_stays_the_current_one(ledger, server):
    """A piece that is sent inside of `db_context()` leaves that unit the current one (P11)."""
    sessions = []

    async def app(scope, receive, send):
        await send(OK)
        async with db_context():
            sessions.append(await db_session(ledger.db))
            await send(chunk(b"1"))
            sessions.append(await db_session(ledger.db))
        await send(END)

    await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert sessions[0] is sessions[1]


async def test_disconnect_before_the_head_changes_nothing(ledger, server):
    """A handler that the server lets run to its end commits (P7)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        server.gone.set()
        await receive()
        await send(OK)
        await send(END)

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 [a]", "body end [a]"]


async def test_disconnect_after_the_body_changes_nothing(ledger, server):
    """Servers report a disconnect after every complete response; it is no failure (P5)."""

    async def app(scope, receive, send):
        await send(OK)
        await ledger.write("a")
        await send(END)
        server.gone.set()
        await receive()

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 200 []", "body end [a]"]


async def test_cancelled_request_rolls_back(ledger, server):
    """A cancellation is passed on and nothing is committed (P7)."""
    started = asyncio.Event()

    async def app(scope, receive, send):
        await ledger.write("a")
        started.set()
        await receive()

    task = asyncio.create_task(server.call(ASGIHTTPDBSessionMiddleware(app)))
    await asyncio.wait_for(started.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert server.log == ["raised CancelledError []"]


async def test_failed_commit_withholds_the_head(ledger, server):
    """No byte of the success answer leaves, and the original error is raised (P4)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        await send(OK)
        await send(END)

    with pytest.raises(IntegrityError):
        await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert server.log == ["raised IntegrityError []"]


async def test_failed_commit_is_raised_whatever_the_application_makes_of_it(ledger, server):
    """Frameworks replace an error that comes out of `send`; the server gets the original (P4b)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        try:
            await send(OK)
        except IntegrityError as error:
            raise RuntimeError("Caught handled exception, but response already started.") from error

    with pytest.raises(IntegrityError) as caught:
        await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert caught.value.__cause__ is caught.value.orig


async def test_swallowed_failure_of_the_commit_is_raised(ledger, server):
    """An application cannot make a success of a commit that failed, not even without an answer (P4)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        for message in (OK, END):
            try:
                await send(message)
            except IntegrityError:
                pass

    with pytest.raises(IntegrityError):
        await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert server.log == ["raised IntegrityError []"]


async def test_cancellation_after_a_failed_commit_stays_a_cancellation(ledger, server):
    """The commit's error takes no cancellation's place (P7)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        try:
            await send(OK)
        except IntegrityError:
            raise asyncio.CancelledError from None

    with pytest.raises(asyncio.CancelledError):
        await server.call(ASGIHTTPDBSessionMiddleware(app))


async def test_error_handler_answers_a_failed_commit(ledger, server):
    """A second head after a failed one is the handler's answer, decided by its own status (P4)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        try:
            await send(OK)
        except IntegrityError:
            await ledger.write("b")
            await send(head(409))
            await send(END)
            await ledger.write("c")

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 409 []", "body end []"]
    assert ledger.names() == "c"


async def test_exception_after_an_answered_commit_error_is_raised_unchanged(ledger, server):
    """Once the failure was answered, a later exception is an affair of its own (P3)."""

    async def app(scope, receive, send):
        await ledger.write_orphan("a")
        try:
            await send(OK)
        except IntegrityError:
            await send(head(409))
            await send(END)
        raise LookupError

    with pytest.raises(LookupError):
        await server.call(ASGIHTTPDBSessionMiddleware(app))


async def test_failed_commit_of_the_body_withholds_its_end(ledger, server):
    """A body whose final commit failed never ends well for the client (P5)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)
        await ledger.write_orphan("b")
        await send(chunk(b"1"))
        for _ in range(2):
            try:
                await send(END)
            except IntegrityError:
                pass
        try:
            await send(head(500))
        except IntegrityError:
            pass

    with pytest.raises(IntegrityError):
        await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert server.log == ["start 200 [a]", "body 1+ [a]", "raised IntegrityError [a]"]


async def test_head_that_the_server_does_not_take_keeps_the_commit(ledger, server):
    """A client that is gone when the head leaves gets nothing; what was committed stays (P3)."""

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)

    async def send(message):
        raise ConnectionError

    server.send = send

    with pytest.raises(ConnectionError):
        await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert ledger.names() == "a"


async def test_before_commit_refuses_by_raising(ledger, server):
    """`before_commit` is asked before each commit and can refuse it (P14)."""

    async def refuse(session):
        raise PermissionError

    async def app(scope, receive, send):
        await ledger.write("a")
        await send(OK)

    with pytest.raises(PermissionError):
        await server.call(ASGIHTTPDBSessionMiddleware(app, refuse))

    assert server.log == ["raised PermissionError []"]


async def test_explicit_units_are_independent(ledger, server):
    """Units inside a request commit by themselves, whatever becomes of the request (P11, P18)."""

    async def app(scope, receive, send):
        async with db_context():
            await ledger.write("a")
        await run_in_new_ctx(ledger.write, "b")
        await ledger.write("c")
        await send(head(400))
        await send(END)

    log = await server.call(ASGIHTTPDBSessionMiddleware(app))

    assert log == ["start 400 [a b]", "body end [a b]"]
