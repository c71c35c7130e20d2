"""Short rounds on every framework, those that have found something once, and what the naive adapter makes of them."""

import pytest

from .ground import NAIVE, Stack
from .report import complaints
from .seeds import CASES
from .soak import soak

#: The last ends the server's process.
_FIRST, _ROUNDS, _SECONDS = 2, 3, 3.0


async def test_acknowledged_is_there_and_refused_is_not(adapter, report):
    """Under load, with everything failing, nothing is lost, nothing appears, nothing bleeds and nothing is left (P3 to P15)."""
    result = await soak(Stack.of(adapter), _FIRST, round_seconds=_SECONDS, rounds=_ROUNDS)
    report(result)

    assert complaints([result]) == []
    assert result.counts["acknowledged"] > 0
    assert result.faults.total() > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.framework}-{case.number}")
async def test_round_that_found_something_is_clean(case):
    """What was found once stays mended."""
    result = await soak(Stack.of(case.framework), case.number, round_seconds=case.seconds, rounds=1)

    assert complaints([result]) == []


async def test_naive_adapter_is_caught(report):
    """The same load and the same checker: it loses, it makes ghosts, it bleeds and it leaks."""
    result = await soak(Stack.of(NAIVE), 0, round_seconds=_SECONDS, rounds=2, patience=2)
    report(result)

    assert result.verdicts["lost"] > 0
    assert result.verdicts["ghosts"] > 0
    assert result.verdicts["bleeding"] > 0
    assert result.verdicts["leaks"] > 0
