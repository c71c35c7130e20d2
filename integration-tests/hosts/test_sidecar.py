"""The sidecar as a process of its own, beside a real cluster: through a failover, under load, and in a real browser."""

import asyncio
import json
import os
import re
import sys

import httpx
import pytest

from . import browser
from .cluster import DATABASE, MONITOR, PASSWORD
from .throughput import compare, sidecar

BROWSER = browser.find()


async def until(client, path, wanted):
    """Ask until an answer is what is wanted."""
    async with asyncio.timeout(20):
        while (answer := await client.get(path)).text != wanted:
            await asyncio.sleep(0.01)
    return answer


async def test_it_follows_a_failover(nodes):
    """pg-status's variables and endpoints: the new primary is answered, the old one never again, and nothing has the password."""
    first, second, third = nodes
    async with sidecar(nodes) as server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        await until(client, "/master?port=1", first.address)
        both = {(await client.get("/replica?port=1")).text for _ in range(4)}
        assert both == {second.address, third.address}
        await asyncio.to_thread(first.kill)
        await second.promote()
        await third.follow(second)
        answer = await client.get("/master?port=1&wait_ms=10000", timeout=20)
        while answer.text != second.address:
            answer = await client.get("/master?port=1&wait_ms=10000", timeout=20)
        await asyncio.to_thread(first.start)
        async with asyncio.timeout(20):
            while not (found := (await client.get(f"/status?host={first.address}&detail=1")).json())["fenced"]:
                await asyncio.sleep(0.01)
        masters = {(await client.get("/master?port=1")).text for _ in range(100)}
        every = [(await client.get(path)).text for path in ("/hosts?detail=1", "/metrics", "/")]

    assert masters == {second.address}
    assert (found["alive"], found["master"], found["role"]) == (True, False, "primary")
    assert f'context_sqla_hosts_fenced{{host="{first.address}"}} 1' in every[1]
    assert "old primary, fenced" in every[2]
    assert not any(PASSWORD in text for text in every)


async def test_a_replica_that_is_behind_is_told(calm):
    """By bytes and by time; a position is waited for, and found as soon as it is replayed."""
    first, second, third = calm
    async with sidecar(calm) as server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
        await until(client, "/master?port=1", first.address)
        await second.pause_replay()
        await third.pause_replay()
        await first.execute("INSERT INTO item (id) SELECT generate_series(-100, -1)")
        lsn = await first.fetchval("SELECT pg_current_wal_insert_lsn()::text")
        assert (await client.get(f"/replica?port=1&min_lsn={lsn}&wait_ms=200")).text == first.address
        waiting = asyncio.ensure_future(client.get(f"/replica?port=1&min_lsn={lsn}&wait_ms=10000"))
        await third.resume_replay()
        assert (await waiting).text == third.address
        await until(client, "/sync_by_bytes?port=1&lag_bytes=0", third.address)
        await until(client, "/sync_by_time?port=1&lag_ms=800", third.address)
        status = (await client.get(f"/status?host={second.address}")).json()

    assert status["lag_bytes"] > 0
    assert status["lag_ms"] > 0


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_check_of_a_cluster_that_is_well(calm, driver):
    """Exit status 0, a table without a password, and the primary alone for scripts."""
    environ = {**os.environ, "CONTEXT_SQLA_HOSTS_PASSWORD": PASSWORD}
    options = ("--hosts", ",".join(node.address for node in calm), "--user", MONITOR, "--database", DATABASE, "--driver", driver)

    async def run(command):
        arguments = [sys.executable, "-m", "context_sqla_hosts", command, *options]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*arguments, env=environ, stdout=pipe, stderr=pipe)
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode(), err.decode()

    status, out, err = await run("check")
    assert (status, err) == (0, ""), out
    assert out.startswith(f"OK: the primary is {calm[0].address}\n")
    assert len(out.splitlines()) == 5
    assert PASSWORD not in out
    assert await run("primary") == (0, f"{calm[0].address}\n", "")


async def test_it_answers_more_than_a_server_of_applications_does(calm, figure):
    """Requests per second of CPU time, beside a trivial application on uvicorn in the same run."""
    found = await compare(calm, rounds=2, seconds=1, everything=False)
    ours, others = found["sidecar, /master"], found["uvicorn (uvloop, httptools), trivial"]
    figure("sidecar /master, requests per CPU second", round(ours), "> 10,000")
    figure("the same, uvicorn (uvloop, httptools), trivial", round(others))
    figure("sidecar, MB", found["sidecar, MB"], "<= 35")

    assert found["sidecar, MB"] < 50  # it is SQLAlchemy that would make it more
    assert ours > 10_000
    assert ours > others


@pytest.mark.needs("chromium")  # without one, the page is parsed in the unit tests
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")])
async def test_the_page_in_a_browser(calm, tmp_path, width, scheme):
    """It fits the screen, is readable in both schemes, asks for nothing else, and no policy is violated."""
    assert BROWSER is not None
    async with sidecar(calm) as server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        await until(client, "/master?port=1", calm[0].address)
        async with asyncio.timeout(20):
            while "<polyline" not in (await client.get("/")).text:
                await asyncio.sleep(0.05)
        async with browser.browser(BROWSER) as page:
            await page.show(width=width, scheme=scheme)
            await page.open(f"http://127.0.0.1:{server.port}/")
            picture = await page.screenshot()
            seen = json.loads(await page.evaluate(_LOOK))
    (tmp_path / f"page-{width}-{scheme}.png").write_bytes(picture)

    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
    assert seen["overflow"] <= 0
    assert seen["rows"] == 3
    assert calm[0].address in seen["text"]
    assert seen["label"] >= 10  # pixels, as high as a reader sees them
    assert seen["cut"] == 0
    assert seen["plot"] > 0.8 * (min(width, 960) - 32)
    assert (brightness(seen["back"]) < 60) is (scheme == "dark")
    assert abs(brightness(seen["back"]) - brightness(seen["front"])) > 150
    assert seen["headers"] is (width > 640)
    assert [url for url in page.requests if not url.endswith(f":{server.port}/")] in (
        [],
        [f"http://127.0.0.1:{server.port}/favicon.ico"],
    )
    assert [problem for problem in page.problems if "404" not in problem] == []


def brightness(colour):
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


_LOOK = """
JSON.stringify({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  rows: document.querySelectorAll("tbody tr").length,
  text: document.body.innerText,
  plot: document.querySelector("svg").getBoundingClientRect().width,
  label: document.querySelector("svg text").getBoundingClientRect().height,
  cut: [...document.querySelectorAll("svg text")].filter(text => {
    const plot = text.closest("svg").getBoundingClientRect(), box = text.getBoundingClientRect();
    return box.left < plot.left - 1 || box.right > plot.right + 1 || box.bottom > plot.bottom + 1 || box.top < plot.top - 1;
  }).length,
  back: getComputedStyle(document.body).backgroundColor,
  front: getComputedStyle(document.body).color,
  headers: getComputedStyle(document.querySelector("thead")).position !== "absolute",
})
"""
