"""The state machine under any sequence of answers: what must hold whatever the servers say."""

from bisect import bisect_right

from context_sqla_hosts._tracker import Failure, Observation, Rules, Tracker
from hypothesis import given, settings
from hypothesis import strategies as st

CLUSTER = 7_000_000_000
HOSTS = ["a", "b", "c", "d"]
timelines = st.integers(1, 4)
observations = st.builds(
    Observation,
    in_recovery=st.booleans(),
    lsn=st.integers(0, 50),
    timeline=timelines,
    system_identifier=st.sampled_from([CLUSTER] * 6 + [1]),
    read_only=st.sampled_from([False] * 6 + [True]),
    control=timelines,
    evidence=st.none() | timelines,
)
failures = st.builds(Failure, st.just("timeout"), st.booleans())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(HOSTS), observations | failures), max_size=40),
    st.booleans(),
)
def test_a_primary_is_never_one_that_may_have_been_left(steps, require_evidence):
    """It answers, says that it is one, is of this cluster, takes writes, and no higher timeline was ever seen."""
    tracker, last, fence, now = Tracker(HOSTS, Rules(require_evidence=require_evidence)), {}, 0, 0.0
    primary = cluster = None
    for host, said in steps:
        now += 1
        if isinstance(said, Failure):
            tracker.failed(host, said)
        else:
            tracker.succeeded(host, said, now - 0.5, now)
        last[host] = said
        snapshot, before, primary = tracker.snapshot(now), primary, None
        primary = snapshot.primary
        assert (snapshot.fence or 0) >= fence or snapshot.system_identifier != cluster
        cluster = snapshot.system_identifier
        fence = snapshot.fence or 0
        if primary is None:
            continue
        status = snapshot.host(primary)
        rivals = [
            s for s in snapshot if s.role == "primary" and s.state in ("up", "suspect") and not s.foreign and not s.read_only
        ]
        assert set(last) == set(HOSTS)
        assert status.state in ("up", "suspect")
        assert (status.role, status.foreign, status.read_only, status.fenced) == ("primary", False, False, False)
        assert status.timeline == fence
        assert sum(s.timeline == fence for s in rivals) == 1 or primary == before
        assert all(s.fenced for s in rivals if s.host != primary)
        assert all(status.lag_bytes is None or status.lag_bytes >= 0 for status in snapshot)


class Truth:
    """A primary whose log grows, and replicas that replay it: what the monitor cannot see."""

    def __init__(self):
        self.now, self.lsn = 0.0, 0
        self.times, self.lsns = [0.0], [0]
        self.replayed = {"b": 0, "c": 0}

    def write(self, amount):
        self.lsn += amount
        self.times.append(self.now)
        self.lsns.append(self.lsn)

    def committed_at(self, moment):
        return self.lsns[bisect_right(self.times, moment) - 1]


moves = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 9), st.just("a")),
        st.tuples(st.just("wait"), st.floats(0.01, 3), st.just("a")),
        st.tuples(st.just("replay"), st.floats(0, 1), st.sampled_from("bc")),
        st.tuples(st.just("probe"), st.floats(0, 0.4), st.sampled_from("abc")),
        st.tuples(st.just("fail"), st.booleans(), st.sampled_from("abc")),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(moves)
def test_what_is_said_to_be_visible_on_a_replica_is_visible_there(steps):
    """`fresh_at` never promises a commit that the replica has not replayed, however late the answers come."""
    truth, tracker = Truth(), Tracker(["a", "b", "c"], Rules())
    for kind, amount, host in steps:
        if kind == "write":
            truth.now += 0.001
            truth.write(amount)
        elif kind == "wait":
            truth.now += amount
        elif kind == "replay":
            truth.replayed[host] += int((truth.lsn - truth.replayed[host]) * amount)
        elif kind == "fail":
            tracker.failed(host, Failure("x", amount))
        else:
            sent, lsn = truth.now, truth.lsn if host == "a" else truth.replayed[host]
            truth.now += amount
            tracker.succeeded(host, Observation(host != "a", lsn, 1, CLUSTER), sent, truth.now)
        for status in tracker.snapshot(truth.now):
            if status.role == "replica" and status.fresh_at is not None:
                assert truth.committed_at(status.fresh_at) <= truth.replayed[status.host]
                assert status.lag(truth.now) >= 0
