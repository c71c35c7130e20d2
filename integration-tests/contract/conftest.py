"""Every test of the contract runs on every framework, and ends with the proof that nothing was left behind."""

import pytest
from support.bench import Bench

from contract.drivers import Framework


@pytest.fixture(autouse=True)
def _contract(bench: Bench, framework: Framework) -> None:
    pass
