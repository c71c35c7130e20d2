"""Reading your own writes: what a visit carries, without a database."""

import time

import pytest
from context_sqla import DBConnect
from context_sqla_hosts import Position, ReadYourWrites, ReadYourWritesMiddleware
from context_sqla_hosts._floor import later, visit_of

KEY = "a key that is long enough"


@pytest.fixture(name="writes")
def _writes(hosts):
    hosts.tell_all()
    return ReadYourWrites(hosts, keys=[KEY])


def test_a_visit_that_wrote_nothing_sets_no_cookie(writes):
    """Pages stay cacheable."""
    with writes.visit() as visit:
        pass

    assert writes.headers(visit) == []
    assert writes.token(visit) is None


def test_what_a_visit_wrote_is_the_floor_of_the_next(writes, hosts):
    """By cookie or by header; of several the latest counts."""
    with writes.visit() as first:
        first.raise_to(Position(1, 70))
    with writes.visit() as second:
        second.raise_to(Position(1, 50))
    cookie = f"a=b; context-sqla-lsn={writes.token(second)}; c=d"
    with writes.visit(cookie=cookie, header=writes.token(first)) as third:
        assert visit_of(hosts) is third

    assert third.needs() == Position(1, 70)
    assert visit_of(hosts) is None


def test_the_cookie_is_for_the_server_only(writes):
    """HttpOnly, Secure, SameSite, and no longer than the position counts."""
    with writes.visit() as visit:
        visit.raise_to(Position(1, 70))
    (_, cookie), (header, token) = writes.headers(visit)

    assert cookie == f"context-sqla-lsn={token}; Max-Age=60; Path=/; HttpOnly; SameSite=Lax; Secure"
    assert header == "X-Context-SQLA-LSN"


def test_cookie_or_header_can_be_left_out(hosts):
    """An API has no use for cookies."""
    hosts.tell_all()
    writes = ReadYourWrites(hosts, keys=[KEY], cookie=None, header=None)
    with writes.visit(cookie="context-sqla-lsn=x") as visit:
        visit.raise_to("primary")

    assert writes.headers(visit) == []
    assert writes.token(visit) is not None


@pytest.mark.parametrize("token", ["", "garbage", "v1.1.46.1800000000.AAAAAAAAAAAAAAAAAAAAAA", "x" * 5_000, "v1.1.x.1.é"])
def test_a_token_that_does_not_count_is_ignored(writes, hosts, token):
    """And counted."""
    with writes.visit(cookie=f"context-sqla-lsn={token}", header=token) as visit:
        assert visit.needs() is None

    assert sum(sample.value for sample in hosts.metrics if sample.name == "tokens_total") == (2 if token else 1)


def test_a_later_write_of_the_same_visit_is_its_floor(writes):
    """A position never goes back within a visit, and an old one is kept where the new one is lower."""
    with writes.visit() as first:
        first.raise_to(Position(2, 10))
    with writes.visit(header=writes.token(first)) as second:
        second.raise_to(Position(1, 500))
        assert second.needs() == Position(2, 10)
        second.raise_to(Position(2, 20))

    assert second.needs() == Position(2, 20)


def test_a_position_that_could_not_be_taken_means_the_primary(writes):
    """Until a later one was taken: that covers everything before."""
    with writes.visit() as first:
        first.raise_to("primary")
    with writes.visit(header=writes.token(first)) as second:
        assert second.needs() == "primary"
        second.raise_to(Position(1, 30))

    assert second.needs() == Position(1, 30)
    assert later(Position(1, 1), "primary") == "primary"


def test_before_the_cluster_is_known_reads_go_to_the_primary(told):
    """No token can be verified then, and none is taken for nothing."""
    with ReadYourWrites(told(["a"]), keys=[KEY]).visit(header="v1.1.1.1.x") as visit:
        assert visit.needs() == "primary"


def test_visits_of_two_clusters_do_not_mix(writes, hosts, told):
    """A position of one means nothing in the other."""
    other = told(["x"])
    with writes.visit() as one, ReadYourWrites(other, keys=[KEY]).visit() as two:
        two.raise_to(Position(9, 9))

        assert (visit_of(hosts), visit_of(other)) == (one, two)
        assert one.needs() is None


async def test_a_session_without_a_database_makes_the_position_unknown(writes, hosts):
    """The commit was good: a failure afterwards fails nobody, it only sends the next reads to the primary."""

    class Broken:
        info = {"context_sqla_hosts.wrote": True}

        async def execute(self, statement):
            raise ConnectionResetError

    with writes.visit() as visit:
        await writes._committed(Broken(), "a:5432")

    assert visit.needs() == "primary"


def test_the_hooks_are_those_of_the_connects_for_writing(hosts):
    """Others are not asked for positions."""
    db = DBConnect.from_url("postgresql+asyncpg://app@nowhere/x")
    writes = ReadYourWrites(hosts, db, keys=[KEY])

    assert (db.before_commit, db.committed) == ([writes._before_commit], [writes._committed])


class Server:
    def __init__(self):
        self.sent = []

    async def receive(self):
        return {"type": "http.request", "body": b""}

    async def send(self, message):
        self.sent.append(message)


async def test_the_head_of_the_response_carries_the_token(writes, hosts):
    """Not an informational one; other headers stay, and the next request brings it back."""

    async def application(scope, receive, send):
        visit = visit_of(hosts)
        needs.append(visit.needs())
        await send({"type": "http.response.start", "status": 103, "headers": []})
        visit.raise_to(Position(1, 70))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    needs, server, app = [], Server(), ReadYourWritesMiddleware(application, writes)
    await app({"type": "http", "headers": []}, server.receive, server.send)
    early, head, _ = server.sent
    values = dict(head["headers"])
    cookie = values[b"set-cookie"].partition(b";")[0]
    await app({"type": "http", "headers": [(b"Cookie", b"x=y"), (b"cookie", cookie)]}, server.receive, server.send)
    await app(
        {"type": "websocket", "headers": [(b"x-context-sqla-lsn", values[b"x-context-sqla-lsn"])]}, server.receive, server.send
    )

    assert early["headers"] == []
    assert head["headers"][0] == (b"a", b"b")
    assert needs == [None, Position(1, 70), Position(1, 70)]


async def test_a_lifespan_is_no_visit(writes, hosts):
    """It has no headers."""

    async def application(scope, receive, send):
        seen.append(visit_of(hosts))

    seen, server = [], Server()
    await ReadYourWritesMiddleware(application, writes)({"type": "lifespan"}, server.receive, server.send)

    assert seen == [None]


def test_an_expired_token_is_ignored(writes, monkeypatch):
    """A minute later every replica that is used has it, or is not used."""
    with writes.visit() as first:
        first.raise_to(Position(1, 70))
    token, now = writes.token(first), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with writes.visit(header=token) as second:
        assert second.needs() is None
