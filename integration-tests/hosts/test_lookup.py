"""What a choice costs in the process."""

import time

from context_sqla_hosts import Position, at_least, primary, replica

from .load import following, watch

ROUNDS = 20_000


async def test_a_choice_costs_about_a_microsecond(calm, figure):
    """Less than a thousandth of a round trip to a sidecar; the figures are the best of five rounds."""
    async with watch(calm) as hosts:
        await hosts.ready(replicas=2)
        while any(status.lag() is None for status in hosts.snapshot()):
            await hosts.changed(1)
        end = hosts.snapshot().host(calm[1].address).lsn
        choices = {
            "primary": primary(hosts),
            "replica(max_lag)": replica(hosts, max_lag=60),
            "at_least(position)": at_least(hosts, lsn=Position(1, end)),
        }
        async with following(choices["primary"]) as db:
            best = {name: min([await nanoseconds(choice, db) for _ in range(5)]) for name, choice in choices.items()}
        start = time.perf_counter_ns()
        for _ in range(ROUNDS):
            hosts.snapshot().primary
        known = (time.perf_counter_ns() - start) / ROUNDS
    figure("lookup, hosts.snapshot().primary, ns", round(known), "< 1,000")
    for name, figures in best.items():
        figure(f"lookup, handler {name}, ns", round(figures))

    assert known < 10_000
    assert best["primary"] < 100_000


async def nanoseconds(choice, db):
    start = time.perf_counter_ns()
    for _ in range(ROUNDS):
        await choice(db)
    return (time.perf_counter_ns() - start) / ROUNDS
