"""Every test of the contract runs on every framework, and ends with the proof that nothing was left behind."""

import pytest
from contract.drivers import Framework
from support.bench import Bench


@pytest.fixture(autouse=True)
def _contract(bench: Bench, framework: Framework) -> None:
    pass
