"""The state machine: what it makes of the answers and failures of probes."""

import pytest
from context_sqla_hosts._tracker import Failure, Observation, Rules, Tracker

CLUSTER = 7_000_000_000
REFUSED, TIMEOUT = Failure("refused", hard=True), Failure("timeout", hard=False)


def primary_says(lsn=100, timeline=1, system_identifier=CLUSTER, **more):
    return Observation(False, lsn, timeline, system_identifier, **more)


def replica_says(lsn=100, timeline=1, control=1, **more):
    return Observation(True, lsn, timeline, CLUSTER, control=control, **more)


class Script:
    """A tracker of hosts a, b, c with a clock."""

    def __init__(self, hosts="abc", **rules):
        self.tracker = Tracker(list(hosts), Rules(**rules))
        self.now = 100.0
        self.events = []

    def tell(self, **said):
        """Let hosts say something, one after the other."""
        for host, what in said.items():
            if isinstance(what, Failure):
                self.events += self.tracker.failed(host, what)
            else:
                self.events += self.tracker.succeeded(host, what, self.now, self.now)
        return self.snapshot

    def later(self, seconds):
        self.now += seconds
        return self

    @property
    def snapshot(self):
        return self.tracker.snapshot(self.now)


@pytest.fixture(name="script")
def _script():
    return Script()


def test_there_is_no_primary_before_every_host_was_tried(script):
    """A zombie that answers first must not get writes while the others are being asked."""
    assert script.tell(a=primary_says()).primary is None
    assert script.tell(b=replica_says()).primary is None
    assert script.tell(c=REFUSED).primary == "a"


def test_a_timeout_is_a_suspicion_and_several_are_death(script):
    """A tolerated failure keeps what was last known (not what was known before that)."""
    script.tell(a=primary_says(lsn=100), b=replica_says(), c=replica_says())
    script.tell(a=primary_says(lsn=200))

    status = script.tell(a=TIMEOUT).host("a")
    assert (status.state, status.lsn, script.snapshot.primary) == ("suspect", 200, "a")
    assert script.tell(a=TIMEOUT).primary is None
    assert script.snapshot.host("a").state == "dead"


def test_one_good_answer_ends_a_suspicion(script):
    """And the count of failures begins anew."""
    script.tell(a=primary_says(), b=replica_says(), c=replica_says())
    for _ in range(3):
        script.tell(a=TIMEOUT)
        assert script.tell(a=primary_says()).host("a").state == "up"


def test_a_refused_connection_is_death_at_once(script):
    """No second probe is needed, whatever `max_fails` is."""
    script.tell(a=primary_says(), b=replica_says(), c=replica_says())

    assert script.tell(a=REFUSED).primary is None
    assert ("dead", "a") in script.events


def test_a_replica_that_was_dead_needs_two_good_answers_and_a_primary_one(script):
    """A replica that flaps is used last."""
    script.tell(a=REFUSED, b=REFUSED, c=replica_says())

    assert script.tell(b=replica_says()).host("b").state == "suspect"
    assert script.tell(b=replica_says()).host("b").state == "up"
    assert script.tell(a=primary_says()).primary == "a"
    assert script.snapshot.host("a").state == "up"


def test_the_new_primary_is_used_before_the_old_one_is_dead(script):
    """A hung primary that others have left counts no longer: a higher timeline wins at once."""
    script.tell(a=primary_says(), b=replica_says(), c=replica_says())
    script.tell(a=TIMEOUT)

    assert script.tell(b=primary_says(timeline=2)).primary == "b"
    assert script.snapshot.host("a").fenced
    assert ("fenced", "a") in script.events


def test_the_old_primary_that_returns_is_fenced(script):
    """Even though it stands first, and even after the new one has died."""
    script.tell(a=REFUSED, b=primary_says(timeline=2), c=replica_says(timeline=2))
    assert script.tell(a=primary_says()).primary == "b"
    assert script.snapshot.split_brain

    assert script.tell(b=REFUSED).primary is None
    assert script.tell(a=primary_says(lsn=900)).primary is None
    assert not script.snapshot.split_brain


@pytest.mark.parametrize("evidence", [{"timeline": 2}, {"timeline": None, "evidence": 2}])
def test_a_follower_alone_raises_the_fence(script, evidence):
    """What it streams, or the files of its log, name the timeline of a primary that is dead already."""
    snapshot = script.tell(a=primary_says(), b=REFUSED, c=replica_says(**evidence))

    assert (snapshot.primary, snapshot.fence) == (None, 2)
    assert snapshot.host("a").fenced


def test_the_timeline_of_a_checkpoint_is_no_evidence(script):
    """It is late: it must not be what tells primaries apart."""
    assert script.tell(a=primary_says(), b=replica_says(control=7), c=replica_says()).primary == "a"


def test_equal_timelines_keep_the_one_that_is_known():
    """Nothing is guessed: a fresh monitor chooses none."""
    fresh, running = Script(), Script()
    running.tell(a=REFUSED, b=primary_says(timeline=2), c=replica_says())

    assert fresh.tell(a=REFUSED, b=primary_says(timeline=2), c=primary_says(timeline=2)).primary is None
    assert fresh.snapshot.split_brain
    assert running.tell(c=primary_says(timeline=2)).primary == "b"


@pytest.mark.parametrize(("mode", "primary"), [("fence", "c"), ("refuse", None), ("first", "a")])
def test_split_brain_can_be_decided_otherwise(mode, primary):
    """`first` is what pg-status does, `refuse` what a careful operator may want."""
    script = Script(split_brain=mode)

    assert script.tell(a=primary_says(), b=REFUSED, c=primary_says(timeline=2)).primary == primary


def test_evidence_can_be_required():
    """Until a follower has shown the timeline, a primary may be one that was left."""
    script = Script(require_evidence=True)

    assert script.tell(a=primary_says(timeline=2), b=REFUSED, c=replica_says(timeline=None)).primary is None
    assert script.tell(c=replica_says(timeline=1)).primary is None
    assert script.tell(c=replica_says(timeline=2)).primary == "a"


def test_the_fence_is_reset_by_hand(script):
    """After a deliberate restore to an older timeline."""
    script.tell(a=primary_says(timeline=5), b=replica_says(timeline=5), c=REFUSED)
    script.tell(a=REFUSED, b=REFUSED)
    assert script.tell(c=primary_says(timeline=3)).primary is None

    script.tracker.reset_fence()
    assert (script.snapshot.primary, script.snapshot.fence) == ("c", 3)


def test_a_replica_that_was_left_behind_does_not_raise_the_fence_again(script):
    """After a reset: its log still has the timeline that was given up, and nobody may serve reads from that as if it were current."""
    script.tell(a=primary_says(timeline=1), b=replica_says(), c=replica_says())
    script.tell(b=primary_says(timeline=2), a=REFUSED, c=replica_says(timeline=2, evidence=2))
    script.tell(b=REFUSED, a=primary_says(timeline=1), c=replica_says(timeline=None, evidence=2))
    assert script.snapshot.primary is None
    script.tracker.reset_fence()
    assert script.snapshot.primary == "a"

    script.later(1).tell(c=replica_says(lsn=500, timeline=None, evidence=2), a=primary_says(lsn=120, timeline=1))
    assert (script.snapshot.primary, script.snapshot.fence) == ("a", 1)
    assert script.snapshot.host("c").timeline == 2
    assert script.snapshot.host("c").fresh_at is None

    script.tell(c=primary_says(timeline=2))
    assert (script.snapshot.primary, script.snapshot.fence) == ("c", 2)
    script.tell(c=REFUSED, b=replica_says(timeline=2))
    assert (script.snapshot.primary, script.snapshot.fence) == (None, 2)


def test_a_read_only_server_is_no_primary(script):
    """`default_transaction_read_only` is how some operators fence."""
    assert script.tell(a=primary_says(read_only=True), b=replica_says(), c=replica_says()).primary is None


def test_a_host_of_another_cluster_is_foreign(script):
    """The first majority is the cluster; what is not of it gets neither writes nor reads."""
    snapshot = script.tell(a=primary_says(timeline=9, system_identifier=1), b=primary_says(), c=replica_says())

    assert snapshot.primary == "b"
    assert snapshot.host("a").foreign
    assert (snapshot.fence, snapshot.system_identifier) == (1, CLUSTER)


def test_two_clusters_of_one_host_each_are_not_chosen_between():
    """There is no majority: nothing is guessed."""
    script = Script("ab")

    assert script.tell(a=primary_says(), b=primary_says(system_identifier=1)).primary is None


def test_lag_is_unknown_before_the_first_sample(script):
    """A replica that has replayed nothing, or less than anything that was sampled, has no lag of 0."""
    snapshot = script.tell(a=primary_says(lsn=500), b=replica_says(lsn=None), c=replica_says(lsn=400))

    assert [snapshot.host(host).lag(script.now) for host in "abc"] == [0.0, None, None]
    assert [snapshot.host(host).lag_bytes for host in "abc"] == [0, None, 100]


def test_an_idle_primary_makes_no_lag(script):
    """Who has all there is, is as fresh as the last look at the primary."""
    script.tell(a=primary_says(lsn=500), b=replica_says(lsn=500), c=replica_says(lsn=500))
    script.later(60).tell(a=primary_says(lsn=500))

    assert script.snapshot.host("b").lag(script.now) == 0.0


def test_lag_grows_while_nobody_looks(script):
    """It is counted from the last observation: a dead primary makes its replicas old, which they are."""
    script.tell(a=primary_says(lsn=500), b=replica_says(lsn=500), c=replica_says(lsn=500))
    script.tell(a=REFUSED).host("b")

    assert script.later(7).snapshot.host("b").lag(script.now) == 7.0
    assert script.snapshot.host("b").age(script.now) == 7.0


def test_a_replica_ahead_of_an_old_look_is_not_behind(script):
    """Byte lag never goes below zero, and never wraps around."""
    script.tell(a=primary_says(lsn=500), b=replica_says(lsn=700), c=replica_says(lsn=500))

    assert script.snapshot.host("b").lag_bytes == 0


def test_a_replica_of_the_old_timeline_does_not_pass_for_a_fresh_one(script):
    """It follows a zombie: however much it has replayed, it lacks what the new primary wrote."""
    script.tell(a=primary_says(lsn=500), b=replica_says(lsn=500), c=replica_says(lsn=500))
    script.tell(a=REFUSED, b=primary_says(lsn=520, timeline=2))
    script.later(5).tell(b=primary_says(lsn=800, timeline=2), c=replica_says(lsn=900, timeline=1))

    assert script.snapshot.host("c").lag(script.now) == 5.0
    assert script.snapshot.host("c").lag_bytes is None


def test_without_rights_a_failover_makes_positions_unknown_until_a_checkpoint_shows_them(script):
    """A role without pg_monitor does not see what a replica follows: after a failover nothing is taken for granted."""
    blind = {"timeline": None}
    script.tell(a=primary_says(lsn=500), b=replica_says(lsn=500, **blind), c=replica_says(lsn=500, **blind))
    assert script.snapshot.host("c").timeline == 1
    script.tell(a=REFUSED, b=primary_says(lsn=520, timeline=2))
    script.later(5).tell(b=primary_says(lsn=800, timeline=2), c=replica_says(lsn=900, **blind))
    assert script.snapshot.host("c").lag(script.now) == 5.0

    script.tell(c=replica_says(lsn=900, control=2, **blind))
    assert script.snapshot.host("c").lag(script.now) == 0.0


def test_a_server_that_was_away_may_come_back_rewound(script):
    """What it had replayed is forgotten with its death."""
    script.tell(a=primary_says(lsn=500), b=replica_says(lsn=500), c=replica_says(lsn=500))
    script.tell(b=REFUSED)

    assert script.tell(b=replica_says(lsn=100)).host("b").lag(script.now) is None


def test_a_restart_of_the_monitor_keeps_the_fence(script):
    """What it saw of the hosts is old, what it knows of the timelines is not."""
    script.tell(a=REFUSED, b=primary_says(timeline=2), c=replica_says())
    script.tracker.restart()

    assert (script.snapshot.primary, script.snapshot.fence, script.snapshot.decided) == (None, 2, False)


def test_a_snapshot_says_in_a_line_what_is_known(script):
    """For errors and logs."""
    script.tell(a=REFUSED, b=primary_says(timeline=2), c=replica_says(timeline=None))
    line = str(script.tell(a=primary_says()))

    assert line == "a up primary timeline 1 fenced, b up the primary timeline 2, c up replica timeline 2"
    with pytest.raises(KeyError):
        script.snapshot.host("d")


def test_samples_of_the_log_are_bounded(script):
    """A monitor runs for years: old samples are dropped, and what they have shown stays known."""
    script.tell(a=primary_says(lsn=1), b=replica_says(lsn=1), c=replica_says(lsn=5_000))
    for lsn in range(2, 10_000):
        script.later(1).tell(a=primary_says(lsn=lsn))
    script.tell(b=replica_says(lsn=2_000))

    assert [script.snapshot.host(host).lag(script.now) for host in "abc"] == [0.0, 9_998.0, 4_999.0]
    assert script.tell(c=REFUSED).host("c").lag(script.now) is None
    script.tell(c=replica_says(lsn=2_000))
    assert script.tell(c=replica_says(lsn=2_000)).host("c").lag(script.now) is None
