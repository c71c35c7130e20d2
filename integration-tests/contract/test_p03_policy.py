"""P3: what commits and what rolls back."""

import pytest
from context_sqla import commit_db_session
from support.rows import add, insert
from support.scenario import Answer, Fail, Feature, Gate, Redirect


class Boom(Exception):
    """An error of the application."""


@pytest.mark.parametrize("status", [200, 201, 204, 303])
async def test_status_below_400_commits(serve, db, ledger, status):
    """An answer below 400 commits (P3)."""

    async def handler(request):
        await insert(db, "a")
        return Answer(status)

    answer = await (await serve(handler)).post()

    assert answer.status == status
    assert await ledger.names() == ["a"]


@pytest.mark.parametrize("status", [400, 404, 409, 500, 503])
async def test_status_from_400_rolls_back(serve, db, ledger, status):
    """An answer of 400 or more rolls back (P3)."""

    async def handler(request):
        await insert(db, "a")
        return Answer(status, "refused")

    answer = await (await serve(handler)).post()

    assert (answer.status, answer.text) == (status, "refused")
    assert await ledger.names() == []


async def test_http_error_rolls_back(serve, db, ledger):
    """The framework's own HTTP exception rolls back (P3)."""

    async def handler(request):
        await insert(db, "a")
        raise Fail(409)

    answer = await (await serve(handler)).post()

    assert answer.status == 409
    assert await ledger.names() == []


@pytest.mark.wire
async def test_unhandled_exception_rolls_back(serve, db, ledger):
    """An exception that nobody handles rolls back, and the client gets a 500 (P3)."""

    async def handler(request):
        await insert(db, "a")
        raise Boom

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


async def test_exception_reaches_its_handler_unchanged(serve, db, ledger):
    """An exception arrives at the application's error handler as the very object that was raised (P3)."""
    boom = Boom("a")
    seen = []

    async def handler(request):
        await insert(db, "a")
        raise boom

    async def answer_boom(exc):
        seen.append(exc)
        return Answer(503, "later")

    answer = await (await serve(handler, error_handlers={Boom: answer_boom})).post()

    assert (answer.status, answer.text) == (503, "later")
    assert len(seen) == 1
    assert seen[0] is boom
    assert await ledger.names() == []


async def test_what_an_error_handler_writes_follows_its_status(serve, db, ledger):
    """An error handler that answers 4xx writes nothing; one that answers 2xx commits what it wrote (P3)."""

    async def handler(request):
        await insert(db, f"handler {request.query['status']}")
        raise Boom(request.query["status"])

    async def answer_boom(exc):
        await add(db, f"error handler {exc}")
        return Answer(int(str(exc)))

    service = await serve(handler, error_handlers={Boom: answer_boom})
    refused = await service.post("/?status=422")
    accepted = await service.post("/?status=202")

    assert (refused.status, accepted.status) == (422, 202)
    assert await ledger.names() == ["error handler 202", "handler 202"]


async def test_returned_redirect_commits(serve, db, ledger):
    """A redirect that is returned commits (P3)."""

    async def handler(request):
        await insert(db, "a")
        return Redirect("/next")

    answer = await (await serve(handler)).post()

    assert (answer.status, answer.headers["location"]) == (303, "/next")
    assert await ledger.names() == ["a"]


async def test_raised_redirect_commits(serve, db, ledger, framework):
    """A redirect that is raised commits like one that is returned (P3)."""

    async def handler(request):
        await insert(db, "a")
        raise Redirect("/next")

    answer = await (await serve(handler)).post()

    assert answer.status == (500 if Feature.REDIRECT_RAISED in framework.lacks else 303)
    assert await ledger.names() == ([] if Feature.REDIRECT_RAISED in framework.lacks else ["a"])


async def test_should_commit_replaces_the_rule(serve, db, ledger):
    """``should_commit`` decides alone: here a 404 commits and a 200 rolls back (P3)."""

    async def handler(request):
        await insert(db, request.query["status"])
        return Answer(int(request.query["status"]))

    service = await serve(handler, should_commit=lambda status: status == 404)
    for status in (200, 303, 404, 500):
        await service.post(f"/?status={status}")

    assert await ledger.names() == ["404"]


async def test_commit_by_hand_stays(serve, db, ledger):
    """What the handler has already committed stays committed, whatever comes after it (P3)."""

    async def handler(request):
        await insert(db, "before")
        await commit_db_session(db)
        await insert(db, "after")
        return Answer(500)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == ["before"]


@pytest.mark.wire
async def test_rule_holds_for_the_body(serve, db, ledger):
    """What a body writes commits under a 200 and rolls back under a 400 (P3)."""

    async def body(name):
        yield b"first"
        await insert(db, name)
        yield b"last"

    async def handler(request):
        status = int(request.query["status"])
        return Answer(status, stream=body(str(status)))

    service = await serve(handler)
    answers = [await service.post(f"/?status={status}") for status in (200, 400)]

    assert [(answer.status, answer.text, answer.complete) for answer in answers] == [
        (200, "firstlast", True),
        (400, "firstlast", True),
    ]
    assert await ledger.names() == ["200"]


async def test_middleware_that_answers_by_itself_follows_the_rule(serve, db, ledger):
    """What a middleware writes before it refuses a request is rolled back; before it lets one pass, it commits (P3)."""

    async def check(request):
        await add(db, f"seen {request.headers['authorization']}")
        return None if request.headers["authorization"] == "good" else Answer(401)

    async def handler(request):
        return Answer(201)

    service = await serve(handler, middleware=[Gate(check)])
    refused = await service.post("/", headers={"authorization": "none"})
    passed = await service.post("/", headers={"authorization": "good"})

    assert (refused.status, passed.status) == (401, 201)
    assert await ledger.names() == ["seen good"]
