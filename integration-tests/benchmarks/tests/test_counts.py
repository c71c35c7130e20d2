"""What a request calls and holds stays what was committed: a guard that no noise of the machine can trip."""

import pytest

from benchmarks.contenders import NO_DB
from benchmarks.counts import FILE, PATHS, UPDATE, Counts, committed, count, key, library

# A few objects more or less may come from a free list, where tracemalloc does not see them.
BLOCKS, BYTES = 4, 320


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("framework", NO_DB)
async def test_a_request_costs_what_was_committed(framework, path):
    """Neither more calls nor more memory, nor less without saying so."""
    numbers = committed().get(framework)
    assert numbers, f"{FILE.name} has no numbers of {framework} on Python {key()}: '{UPDATE}' writes them"
    before, now = Counts(**numbers[path]), await count(framework, path)

    assert now.calls == before.calls and abs(now.blocks - before.blocks) <= BLOCKS and abs(now.bytes - before.bytes) <= BYTES, (
        f"{framework}, {path}: {before} were committed on {numbers['library']}, now with {library(framework)} it is {now}. "
        f"If that is meant, '{UPDATE}' writes the new numbers, which take a commit of their own with the reason; "
        f"'nox -s bench -- counts {framework}' shows the calls one by one"
    )
