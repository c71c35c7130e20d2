"""The recipe of how-to/row-level-security.md, as it stands there, keeps tenants apart on PostgreSQL."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio
from context_sqla import DBConnect, commit_db_session, db_session, run_in_new_ctx
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

PAGE = (Path(__file__).parent / "how-to" / "row-level-security.md").read_text("utf-8")
ROLE = "tenants_of_the_docs"

pytestmark = pytest.mark.context_sqla("off")


@pytest.fixture(name="recipe")
def _recipe() -> ModuleType:
    """Run the page's first Python block."""
    module = ModuleType("recipe")
    code = re.search(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert code is not None
    exec(code[1], module.__dict__)  # noqa: S102
    return module


@pytest_asyncio.fixture(name="url")
async def _url(context_sqla_url: str) -> AsyncIterator[URL]:
    """Make a table with the page's policy, and a role that has to obey it."""
    url = make_url(context_sqla_url)
    if url.get_backend_name() != "postgresql":
        pytest.skip("policies are PostgreSQL's")
    policy = re.search(r"^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert policy is not None
    before = ["CREATE TABLE users (id serial PRIMARY KEY, name text)", f"CREATE ROLE {ROLE} LOGIN PASSWORD 'secret'"]
    after = [f"GRANT ALL ON users, users_id_seq TO {ROLE}"]
    owner = create_async_engine(url)
    async with owner.begin() as connection:
        for statement in [*before, *re.sub(r"--.*", "", policy[1]).split(";")[:-1], *after]:
            await connection.execute(text(statement))
    yield url.set(username=ROLE, password="secret")  # noqa: S106
    async with owner.begin() as connection:
        await connection.execute(text("DROP TABLE users"))
        await connection.execute(text(f"DROP ROLE {ROLE}"))
    await owner.dispose()


async def add(db: DBConnect[Any], name: str) -> None:
    """Add a user."""
    await (await db_session(db)).execute(text("INSERT INTO users (name) VALUES (:name)"), {"name": name})


async def names(db: DBConnect[Any]) -> list[str]:
    """Return the names that are seen, in two transactions."""
    first = list(await (await db_session(db)).scalars(text("SELECT name FROM users ORDER BY id")))
    await commit_db_session(db)
    assert list(await (await db_session(db)).scalars(text("SELECT name FROM users ORDER BY id"))) == first
    return first


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_tenant_sees_its_own_rows(url: URL, recipe: ModuleType, driver: str) -> None:
    """On one connection that goes from tenant to tenant, in every transaction of a unit."""
    one_connection = {"pool_size": 1, "max_overflow": 0}
    address = url.set(drivername=f"postgresql+{driver}")
    db = DBConnect.from_url(address, session_class=recipe.TenantSession, engine_options=one_connection)
    for tenant, name in (("north", "Ada"), ("south", "Grace")):
        recipe.tenant.set(tenant)
        await run_in_new_ctx(add, db, name)

    seen = {}
    for tenant in ("north", "south", "west", ""):
        recipe.tenant.set(tenant)
        seen[tenant] = await run_in_new_ctx(names, db)

    assert seen == {"north": ["Ada"], "south": ["Grace"], "west": [], "": []}
    await db.close()


async def test_nothing_is_added_without_a_tenant(url: URL, recipe: ModuleType) -> None:
    """The empty setting is no tenant."""
    db = DBConnect.from_url(url.set(drivername="postgresql+asyncpg"), session_class=recipe.TenantSession)

    with pytest.raises(DBAPIError):
        await run_in_new_ctx(add, db, "nobody")

    await db.close()
