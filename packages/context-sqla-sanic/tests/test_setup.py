"""What `setup` does to an application, and when it refuses."""

import pytest
from context_sqla.errors import SetupError, UnavailableError
from context_sqla_sanic import setup
from sanic import Request, text


async def test_setup_twice_is_refused(app, ledger):
    """Once, with all its connects."""
    setup(app, ledger.db)

    with pytest.raises(SetupError, match="already"):
        setup(app, ledger.db)


async def test_setup_after_the_start_is_refused(app, ledger, serve):
    """Sanic would run without the unit, in silence."""
    app.get("/")(lambda request: text("ok"))

    async with serve(app):
        with pytest.raises(SetupError, match="has started"):
            setup(app, ledger.db)


async def test_what_is_no_connect_is_refused(app):
    """A list of connects would be closed by nobody."""
    with pytest.raises(TypeError, match="not list"):
        setup(app, [])


async def test_own_request_class_is_kept(app, ledger, serve):
    """The application's request class stays the base, slots and all."""

    class Own(Request):
        __slots__ = ("own",)

    app.request_class = Own
    setup(app, ledger.db)

    @app.get("/")
    async def handler(request):
        request.own = "mine"
        await ledger.write("a")
        return text(request.own)

    async with serve(app) as server:
        answer = await server.request("GET")

    assert (answer.text, ledger.names()) == ("mine", "a")


async def test_connects_are_closed_after_the_applications_listeners(app, ledger, serve, monkeypatch):
    """An `after_server_stop` listener of the application may still use the database, whenever it was registered."""
    closed = []
    close = ledger.db.close

    async def note():
        closed.append("connect")
        await close()

    monkeypatch.setattr(ledger.db, "close", note)
    app.after_server_stop(lambda app: closed.append("before setup"))
    setup(app, ledger.db)
    app.after_server_stop(lambda app: closed.append("after setup"))
    app.get("/")(lambda request: text("ok"))

    async with serve(app):
        pass

    assert sorted(closed[:2]) == ["after setup", "before setup"]
    assert closed[2:] == ["connect"]


async def test_unavailable_is_503_with_retry_after(app, serve):
    """The default answer."""
    setup(app)

    @app.get("/")
    async def handler(request):
        raise UnavailableError("away", retry_after=2.5)

    async with serve(app) as server:
        answer = await server.request("GET")

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


@pytest.mark.parametrize("kind", UnavailableError.__mro__[:2])
async def test_applications_own_answer_for_unavailable_is_left_alone(app, serve, kind):
    """A handler for it, or for all of our errors, wins, also one that is added after `setup`."""
    setup(app)

    @app.exception(kind)
    async def own(request, exc):
        return text("mine", 502)

    @app.get("/")
    async def handler(request):
        raise UnavailableError("away")

    async with serve(app) as server:
        answer = await server.request("GET")

    assert (answer.status_code, answer.text) == (502, "mine")


async def test_handler_for_every_exception_does_not_answer_for_unavailable(app, serve):
    """It is for what nobody expected."""
    setup(app)
    app.exception(Exception)(lambda request, exc: text("unexpected", 500))

    @app.get("/")
    async def handler(request):
        raise UnavailableError("away")

    async with serve(app) as server:
        answer = await server.request("GET")

    assert answer.status_code == 503


async def test_rule_and_check_are_taken(app, ledger, serve):
    """`should_commit` and `before_commit` reach the unit."""
    seen = []

    async def look(session):
        seen.append(session)

    setup(app, ledger.db, should_commit=lambda status: status in (200, 404), before_commit=look)

    @app.post("/<status:int>")
    async def handler(request, status):
        await ledger.write(str(status))
        return text("ok", status)

    async with serve(app) as server:
        for status in (200, 201, 404):
            await server.request("POST", f"/{status}")

    assert ledger.names() == "200 404"
    assert len(seen) == 2
