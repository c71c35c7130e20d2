"""The choice of stacks: enough of them, and the same number for every framework."""

from itertools import product

import pytest
from support.stacks import Selection, choose

SERVERS = ("one", "two", "three")
DATABASES = ("asyncpg", "psycopg", "aiosqlite")


def test_eight_plain_tests_see_every_pair():
    """Every pair of server and database occurs in a file of eight tests."""
    seen = {pair for number in range(8) for pair in choose(SERVERS, DATABASES, number=number, wire=False, selection=Selection())}

    assert seen == set(product(SERVERS, DATABASES))


@pytest.mark.parametrize("number", range(8))
def test_wire_test_sees_every_server_and_every_database(number):
    """One test that is about the wire runs on all servers and on all databases."""
    pairs = choose(SERVERS, DATABASES, number=number, wire=True, selection=Selection())

    assert {server for server, _ in pairs} == set(SERVERS)
    assert {database for _, database in pairs} == set(DATABASES)


@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("databases", [DATABASES, DATABASES[:2], DATABASES[2:]])
@pytest.mark.parametrize("number", range(16))
def test_default_stack_is_always_there(number, databases, wire):
    """Every test runs on the first server and the first of its databases, and on no pair twice."""
    pairs = choose(SERVERS, databases, number=number, wire=wire, selection=Selection())

    assert pairs[0] == (SERVERS[0], databases[0])
    assert len(pairs) == len(set(pairs)) > 1


def test_options_give_the_product_of_what_they_ask_for():
    """``--server`` and ``--database`` ask for exactly that, ``--full`` for everything."""
    asked = choose(SERVERS, DATABASES, number=0, wire=False, selection=Selection(servers=["two", "three"]))
    full = choose(SERVERS, DATABASES, number=0, wire=False, selection=Selection(databases=["psycopg"], full=True))

    assert asked == [("two", "asyncpg"), ("three", "asyncpg")]
    assert full == [(server, "psycopg") for server in SERVERS]
