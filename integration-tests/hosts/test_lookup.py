"""What a choice costs in the process."""

import time

from context_sqla_hosts import Position, at_least, primary, replica

from .load import following, watch

ROUNDS, CALLS = 20, 5_000


async def test_a_choice_costs_less_than_a_microsecond(calm, figure):
    """Less than a thousandth of a round trip to a sidecar; the figures are the CPU time of the best of twenty rounds."""
    async with watch(calm) as hosts:
        await hosts.ready(replicas=2)
        while any(status.lag() is None for status in hosts.snapshot()):
            await hosts.changed(1)
        end = hosts.snapshot().host(calm[1].address).lsn
        choices = {
            "primary": primary(hosts),
            "replica": replica(hosts),
            "replica(max_lag)": replica(hosts, max_lag=60),
            "replica(least_lag)": replica(hosts, balance="least_lag"),
            "at_least(position)": at_least(hosts, lsn=Position(1, end)),
            "at_least, no position": at_least(hosts),
        }

        async def known():
            hosts.snapshot().primary

        async with following(choices["primary"]) as db:
            best = {"hosts.snapshot().primary": await nanoseconds(hosts, known)}
            for name, choice in choices.items():
                best[f"handler {name}"] = await nanoseconds(hosts, choice, db)
    for name, figures in best.items():
        figure(f"lookup, {name}, ns", round(figures), "< 1,000")

    assert max(best.values()) < 10_000  # ten times what is wanted


async def nanoseconds(hosts, function, *arguments):
    best = float("inf")
    for _ in range(ROUNDS):
        await hosts.refresh()  # the rounds do not let the event loop run, and what is known would be old
        start = time.thread_time_ns()
        for _ in range(CALLS):
            await function(*arguments)
        best = min(best, time.thread_time_ns() - start)
    return best / CALLS
