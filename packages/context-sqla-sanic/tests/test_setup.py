"""What `setup` does to an application, and when it refuses."""

import pickle
from functools import partial
from typing import ClassVar

import pytest
from context_sqla.errors import SetupError, UnavailableError
from context_sqla_sanic import setup
from sanic import Request, Sanic, text


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


class Own(Sanic):
    """An application class of the user, which handles requests in its own way."""

    handled: ClassVar[list[str]] = []

    async def handle_request(self, request):
        """Note it."""
        await super().handle_request(request)
        self.handled.append(request.path)

    async def handle_exception(self, request, exception, run_middleware=True):
        """Note it."""
        self.handled.append(type(exception).__name__)
        await super().handle_exception(request, exception, run_middleware)


async def test_own_application_class_is_kept(app, ledger, serve):
    """The application stays one of its own class, whose methods are called, inside the unit."""
    app = Own("own", configure_logging=False)
    setup(app, ledger.db)
    Own.handled.clear()

    @app.get("/<name>")
    async def handler(request, name):
        await ledger.write(name)
        if name == "bad":
            raise KeyError
        return text("ok")

    async with serve(app) as server:
        statuses = [(await server.request("GET", f"/{name}")).status_code for name in ("good", "bad")]

    assert (statuses, ledger.names()) == ([200, 500], "good")
    assert Own.handled == ["/good", "KeyError", "/bad"]
    assert (isinstance(app, Own), type(app).__name__, str(app)) == (True, "Own", "<Own own>")


@pytest.mark.parametrize("kind", [Sanic, Own])
def test_workers_are_given_a_class_that_they_can_import(app, ledger, kind):
    """Sanic sends them the class that serves; the one that `setup` makes is in no module."""
    app = kind("served", configure_logging=False)
    setup(app, ledger.db)

    serves = type(app).serve.__self__

    assert serves is kind
    assert pickle.loads(pickle.dumps(partial(serves.get_app, app.name)))() is app


async def test_applications_of_one_process_have_rules_of_their_own(app, ledger, serve):
    """What `setup` does to one application is none of another's business."""
    other = Sanic("other", configure_logging=False)
    bare = Sanic("bare", configure_logging=False)
    setup(app, ledger.db)
    setup(other, ledger.db, should_commit=lambda status: status == 404)

    async def handler(request, name):
        if request.app is not bare:
            await ledger.write(name)
        return text("ok", 404)

    for one in (app, other, bare):
        one.get("/<name>")(handler)

    async with serve(app) as first, serve(other) as second, serve(bare) as third:
        for server, name in ((first, "a"), (second, "b"), (third, "c"), (first, "d")):
            await server.request("GET", f"/{name}")

    assert ledger.names() == "b"
    assert type(bare) is Sanic
    assert bare.request_class is Request


def test_no_signal_is_listened_to(app, ledger):
    """Sending one costs more than a unit that nobody uses (P1)."""
    setup(app, ledger.db)

    assert not [route.path for route in app.signal_router.routes if route.path.startswith("http")]


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
