"""The hooks that a user's conftest may implement."""

import pytest


@pytest.hookspec(firstresult=True)
def pytest_context_sqla_create_schema(config: pytest.Config, url: str) -> object:
    """Make the tables in an empty database, once for all workers; return True to say that it is done.

    It is no coroutine function and is called outside of every event loop, so that Alembic's `command.upgrade` works in it.
    Without it, the tables of the ini option `context_sqla_metadata` are made.

    Args:
        config: pytest's configuration.
        url: the database, password included.
    """
