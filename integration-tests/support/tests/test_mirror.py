"""Two processes agree about what a handler can reach; here both are in one process, each with a world of its own."""

import asyncio
import functools

import pytest
from support.mirror import Mirror, There
from support.scenario import Route


class World:
    """A test with a handler; a fork would make the second one."""

    def __init__(self, where):
        seen, named, members, done, count = [], {}, set(), asyncio.Event(), 0
        self.lost = LookupError("known before")

        def note(value):
            nonlocal count
            count += 1
            seen.append(value)
            named[value] = count
            members.add(value)

        async def handler(request):
            note(request)
            done.set()
            raise self.lost

        self.seen, self.named, self.members, self.done = seen, named, members, done
        self.note, self.count = note, lambda: count
        self.mirror = Mirror([[Route("/", functools.partial(handler))], self.lost, self.count])
        self.mirror.where = where

    def tell(self, other):
        """Send what has changed, and one more value."""
        changes, _ = other.mirror.loads(self.mirror.dumps((self.mirror.changes(), None)))
        other.mirror.apply(changes)

    def value(self, other, value):
        """Send a value; return what it is there."""
        return other.mirror.loads(self.mirror.dumps(value))


@pytest.fixture(name="worlds")
def _worlds():
    return World(-1), World(0)


def test_what_a_handler_changes_is_changed_everywhere(worlds):
    """Lists, dicts, sets, events and variables that the closure of a handler leads to."""
    test, worker = worlds
    worker.note("a")
    worker.done.set()
    worker.tell(test)

    assert (test.seen, test.named, test.members, test.count()) == (["a"], {"a": 1}, {"a"}, 1)
    assert test.done.is_set()


def test_nothing_is_told_twice_or_sent_back(worlds):
    """What came from the other is no change of one's own."""
    test, worker = worlds
    worker.note("a")
    worker.tell(test)

    assert (worker.mirror.changes(), test.mirror.changes()) == ([], [])


def test_what_both_add_at_once_is_there_once_on_both_sides(worlds):
    """The one that is asked has its own behind what it is told; the variable has counted both."""
    test, worker = worlds
    test.note("test")
    worker.note("worker")
    test.tell(worker)
    worker.tell(test)

    assert test.seen == worker.seen == ["test", "worker"]
    assert test.count() == worker.count() == 2
    assert test.members == worker.members == {"test", "worker"}


def test_list_that_was_emptied_is_empty(worlds):
    """Other changes than an append are told as well."""
    test, worker = worlds
    worker.note("a")
    worker.tell(test)
    test.seen.clear()
    del test.named["a"]
    test.members.clear()
    test.tell(worker)

    assert (worker.seen, worker.named, worker.members) == ([], {}, set())


def test_exception_crosses_with_its_cause_and_notes(worlds):
    """It is made again; one of a class that the other process cannot know stays where it is."""

    class Local(Exception):
        pass

    test, worker = worlds
    try:
        raise ValueError("outer") from KeyError("inner")
    except ValueError as exc:
        exc.add_note("noted")
        there = worker.value(test, exc)

    assert (type(there), str(there), there.__notes__) == (ValueError, "outer", ["noted"])
    assert isinstance(there.__cause__, KeyError)
    assert isinstance(worker.value(test, Local()), There)


def test_object_that_both_know_is_the_same(worlds):
    """An exception of the test that its handler raises is that one when it comes back."""
    test, worker = worlds

    assert worker.value(test, worker.lost) is test.lost


def test_object_that_does_not_cross_is_one_stand_in(worlds):
    """Identity is kept, and the way back leads to the object itself."""
    test, worker = worlds
    session = object()
    first, second = worker.value(test, [session, session])

    assert isinstance(first, There)
    assert first is second
    assert test.value(worker, first) is session
    assert worker.value(test, object()) is not first
