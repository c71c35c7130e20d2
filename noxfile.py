"""Every check of this repository is a session here: `nox -l` is the manual.

`nox` alone runs what a change must pass. `nox -s NAME -- ARGS` passes arguments on, mostly to pytest; `nox -t starlette` runs all
sessions of one framework. Each session has its own environment, with the versions of `uv.lock` where uv is installed beside nox.
"""

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

import nox

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"  # a Python that is not installed is skipped; GitHub's matrix has them all
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
NEXT_PYTHON = "3.15"  # may fail
# By name: a folder of packages/ is a distribution, and one that has a driver in the contract is the adapter of a framework.
PROJECTS = {path.parent.name: nox.project.load_toml(path)["project"] for path in Path("packages").glob("*/pyproject.toml")}
PACKAGES = sorted(PROJECTS)
DRIVERS = sorted(path.stem for path in Path("integration-tests/contract/drivers").glob("[!_]*.py"))


def needed(*packages: str) -> list[str]:
    """Return packages of this workspace with what they declare to need of it."""
    texts = [text for name in packages for text in PROJECTS[name]["dependencies"]]
    siblings = [name for name in PACKAGES if any(text.startswith(f"{name}>=") for text in texts)]
    return sorted({*packages, *(needed(*siblings) if siblings else [])})


# What each framework's sessions install of this workspace, and no more: its adapter with what that needs; the suite needs asgi.
FRAMEWORKS = {name: needed("context-sqla-asgi", f"context-sqla-{name}") for name in DRIVERS}
# Servers on which the contract runs a second time, with all tests.
MORE_SERVERS = {"sanic": ["sanic-workers"]}
EVERY_ADAPTER = sorted({package for needs in FRAMEWORKS.values() for package in needs})
PYTEST = "context-sqla-pytest"
PACKAGING = "integration-tests/packaging"
HOSTS = "integration-tests/hosts"
FAULTS = "integration-tests/faults"
BENCHMARKS = "integration-tests/benchmarks"
BENCHED = [name for name in PACKAGES if name not in ("context-sqla-hosts", "context-sqla-pytest")]
COUNTED = ["3.11", "3.13"]  # the Pythons whose counts are committed
MEASURED = Path("build", "bench")
WORKERS = (os.cpu_count() or 1) + 1  # the contract waits almost as long as it works
RESULTS = Path("results")  # what the contract sessions have seen; `nox -s results` joins it
Versions = Literal["locked", "lowest", "newest", "prerelease"]
ALONE = f"--confcutdir={PACKAGING}"  # without the fixtures of the contract, which need servers

each_framework = nox.parametrize("framework", [nox.param(name, id=name, tags=[name]) for name in FRAMEWORKS])

# Where certificates are checked by the system's own store, uv shall do so too, as pip does.
os.environ.setdefault("UV_SYSTEM_CERTS", "true")

# pyenv's shims answer only for the version that is switched on: look at the versions themselves, after everything else.
with contextlib.suppress(OSError, RuntimeError):  # there may be no home, or somebody else's
    _pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, sorted(_pyenv.glob("versions/3.1[1-4].*/bin")))])


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Run everything that a change must pass: the newcomer's command, and CI's."""
    shutil.rmtree(RESULTS, ignore_errors=True)
    for name in ("lint", "workflows", "types", "boundaries", "support", "build"):
        session.notify(name)
    for python in (PYTHONS[0], *PYTHONS[2:]):  # GitHub has all of them
        session.notify(f"unit-{python}")
    session.notify("sqlalchemy-2.0")
    session.notify("plugin")
    for python in COUNTED:
        session.notify(f"costs-{python}")
    session.notify("examples")
    session.notify("docs")
    for framework in FRAMEWORKS:
        session.notify(f"contract({framework})")
    session.notify("faults")
    session.notify("hosts", ["-m", "not long"])
    session.notify("results")


@nox.session
def quick(session: nox.Session) -> None:
    """Run the tests of the core, of FastAPI's adapter and of its example, on SQLite: the first green test after a clone."""
    install(session, "test", "demo", packages=FRAMEWORKS["fastapi"])
    tests = [f"packages/{name}/tests" for name in FRAMEWORKS["fastapi"]]
    session.run("pytest", *tests, "examples/fastapi", "--numprocesses=auto", *session.posargs)


@nox.session(tags=["ci"])
def lint(session: nox.Session) -> None:
    """Check style and format with ruff; `nox -s lint -- --fix` mends what can be mended."""
    install(session, "lint")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))


@nox.session(tags=["ci"])
def workflows(session: nox.Session) -> None:
    """Check GitHub's workflows with actionlint and zizmor, without asking GitHub."""
    install(session, "workflows")
    session.run("actionlint", "-shellcheck=", "-pyflakes=")  # what is installed beside it makes no difference
    session.run("zizmor", "--offline", "--quiet", "--persona=pedantic", ".github", *session.posargs)


@nox.session(tags=["ci"])
def types(session: nox.Session) -> None:
    """Check types with mypy (strict) and pyright, and that every public type of a package is known."""
    install(session, "types", packages=PACKAGES)
    for name in PACKAGES:
        package = Path("packages", name)
        session.run("mypy", str(package / "src"))
        if checked := sorted(map(str, package.glob("tests/typing/*.py"))):
            session.run("mypy", *checked)
    session.run("pyright")
    for name in PACKAGES:
        session.run("pyright", "--ignoreexternal", "--verifytypes", name.replace("-", "_"))


@nox.session(tags=["ci"])
def boundaries(session: nox.Session) -> None:
    """Check who imports whom, the size budgets, versions, the public names and the list of promises."""
    install(session, "test", "boundaries", packages=PACKAGES)
    session.run("lint-imports", "--no-logo")
    session.run("pytest", PACKAGING, ALONE, f"--ignore={PACKAGING}/test_wheels.py", *session.posargs)


@nox.session(tags=["ci"])
def support(session: nox.Session) -> None:
    """Test the suite's own parts, and that the tables of support in README and docs are up to date; `-- --write` writes them."""
    install(session, "test", "servers", packages=FRAMEWORKS["asgi"])
    if session.posargs == ["--write"]:
        session.run("python", "-m", "support.pages", "--write", env={"PYTHONPATH": "integration-tests"})
    else:
        session.run("pytest", "integration-tests/support/tests", *session.posargs)


@nox.session(tags=["ci"])
def build(session: nox.Session) -> None:
    """Build wheels and sdists into dist/, or take those in DIST, and check what is in them and that each installs alone."""
    install(session, "test", "boundaries")
    dist = built(session)
    session.env["DIST"] = str(dist.resolve())
    session.run("pytest", f"{PACKAGING}/test_wheels.py", ALONE, *session.posargs)


@nox.session(python=PYTHONS, tags=["ci"])
def installs(session: nox.Session) -> None:
    """Install each wheel alone, in newest and (on the lowest Python) lowest versions, and use it; DIST names those to take."""
    install(session, "boundaries")
    dist = built(session)
    only = [] if session.python == PYTHONS[0] else ["--only=newest"]  # for a newer Python, old releases have no wheels
    session.run("python", f"{PACKAGING}/installs.py", str(dist), *only, *session.posargs)


@nox.session(python=PYTHONS, tags=["ci"])
def unit(session: nox.Session) -> None:
    """Run the unit tests of all packages but the pytest plugin's, on every Python that is installed."""
    install(session, "test", packages=PACKAGES)
    run_unit_tests(session)


@nox.session(name="unit-next", python=NEXT_PYTHON, tags=["next"])
def unit_next(session: nox.Session) -> None:
    """Run the unit tests on the Python that is to come; a failure is news, and holds nobody up."""
    install(session, "test", packages=PACKAGES)
    run_unit_tests(session)


@nox.session(tags=["platforms"])
def sqlite(session: nox.Session) -> None:
    """Run what needs no PostgreSQL, on every system: unit tests, examples, and every promise that SQLite can show."""
    install(session, "test", "servers", "demo", packages=PACKAGES)
    run_unit_tests(session, "examples")
    session.run("pytest", "integration-tests/contract", "--database=aiosqlite", "--numprocesses=auto", *session.posargs)


@nox.session(tags=["ci"])
def plugin(session: nox.Session) -> None:
    """Run the tests of the pytest plugin, each of which is a run of pytest, on the Python that nox runs on."""
    install(session, "test", packages=PACKAGES)
    session.run("pytest", f"packages/{PYTEST}/tests", "--numprocesses=auto", *session.posargs)


@nox.session(name="sqlalchemy-2.0", tags=["ci"])
def sqlalchemy_2_0(session: nox.Session) -> None:
    """Run the core's unit tests on the lowest SQLAlchemy, which is of the series before; adapters import none of it."""
    install(session, "test", packages=["context-sqla"])
    session.install("sqlalchemy[asyncio]==2.0.55")
    session.run("pytest", "packages/context-sqla/tests", "--numprocesses=auto", *session.posargs)


@nox.session(name="contract-sqlalchemy-2.0", tags=["nightly"])
def contract_sqlalchemy_2_0(session: nox.Session) -> None:
    """Run one framework's contract on the lowest SQLAlchemy."""
    install(session, "test", "servers", packages=FRAMEWORKS["starlette"])
    session.install("sqlalchemy[asyncio]==2.0.55")
    run_contract(session, "starlette", "sqlalchemy-2.0")


@nox.session(tags=["ci"])
def examples(session: nox.Session) -> None:
    """Run the tests of the example applications, and every code block of the documentation."""
    install(session, "test", "servers", "demo", packages=PACKAGES)
    session.run("pytest", "examples", "docs", "--numprocesses=auto", "--dist=loadfile", *session.posargs)


@nox.session(tags=["ci"])
def docs(session: nox.Session) -> None:
    """Build the documentation into build/docs, where warnings are errors, and check its links; `-- --open` shows it."""
    install(session, "docs", "demo", packages=PACKAGES)
    session.run("towncrier", "build", "--draft", "--version=next", silent=True)
    site = Path("build", "docs").resolve()
    shutil.rmtree(site, ignore_errors=True)
    session.run("sphinx-build", "--quiet", "--fail-on-warning", "--keep-going", "-d", session.create_tmp(), "docs", str(site))
    session.run("python", "docs/check_site.py", str(site))
    if "--open" in session.posargs:
        session.run("python", "-m", "webbrowser", (site / "index.html").as_uri())


@nox.session(tags=["ci"])
@each_framework
def contract(session: nox.Session, framework: str) -> None:
    """Run every promise on one framework, whose adapter is alone with its declared dependencies."""
    install(session, "test", "servers", packages=FRAMEWORKS[framework])
    run_contract(session, framework, "newest")
    for server in MORE_SERVERS.get(framework, ()):
        run_contract(session, framework, server, f"--server={server}")


@nox.session(tags=["ci"])
def hosts(session: nox.Session) -> None:
    """Run the acceptance of context-sqla-hosts on real clusters, and print its figures; `PG_BINDIR` names another PostgreSQL.

    What it needs of other programs and does not find it names, with how to install it; with CI=true that is a failure.
    """
    install(session, "test", "servers", "clusters", packages=[*FRAMEWORKS["fastapi"], "context-sqla-hosts"])
    run_hosts(session, *session.posargs)


@nox.session(tags=["ci"])
def faults(session: nox.Session) -> None:
    """Put every framework under load while everything fails, and hold what the clients saw against the rows; three minutes."""
    install(session, "test", "servers", packages=EVERY_ADAPTER)
    session.run("pytest", FAULTS, "--numprocesses=auto", *session.posargs)


@nox.session(tags=["nightly"])
def soak(session: nox.Session) -> None:
    """Do the same for long: `-- --minutes N --seed S --framework X`; a table, `build/soak.json`, and how to run a round again."""
    install(session, "test", "servers", packages=EVERY_ADAPTER)
    session.run("python", "-m", "faults.soak", *session.posargs, env={"PYTHONPATH": "integration-tests"})


@nox.session(name="contract-full", tags=["nightly"])
@nox.parametrize("framework", list(FRAMEWORKS), ids=list(FRAMEWORKS))
def contract_full(session: nox.Session, framework: str) -> None:
    """Run every promise on every server and every database, not only pairwise."""
    install(session, "test", "servers", packages=FRAMEWORKS[framework])
    run_contract(session, framework, "full", "--full")
    for server in MORE_SERVERS.get(framework, ()):
        run_contract(session, framework, f"{server}-full", "--full", f"--server={server}")


@nox.session(tags=["nightly"])
@each_framework
def lowest(session: nox.Session, framework: str) -> None:
    """Run the promises on the lowest versions that the packages declare."""
    install(session, "test", "servers", packages=FRAMEWORKS[framework], versions="lowest")
    old = "-Wdefault::DeprecationWarning"  # old frameworks use what newer Pythons and pydantics deprecate
    run_contract(session, framework, "lowest", old)
    for server in MORE_SERVERS.get(framework, ()):
        run_contract(session, framework, f"{server}-lowest", old, f"--server={server}")


@nox.session(tags=["nightly"])
@each_framework
def newest(session: nox.Session, framework: str) -> None:
    """Run the promises on what was released by today, whatever uv.lock says."""
    install(session, "test", "servers", packages=FRAMEWORKS[framework], versions="newest")
    run_contract(session, framework, "released")


@nox.session(tags=["prereleases"])
@each_framework
def prerelease(session: nox.Session, framework: str) -> None:
    """Run the promises on alphas, betas and candidates of everything; a failure is news, and holds nobody up."""
    install(session, "test", "servers", packages=FRAMEWORKS[framework], versions="prerelease")
    run_contract(session, framework, "prerelease", "-Wdefault::DeprecationWarning")


@nox.session(python=COUNTED, tags=["ci"])
def costs(session: nox.Session) -> None:
    """Hold what a request calls and holds against the committed numbers, and let every benchmark run for a moment."""
    install(session, "test", packages=BENCHED)
    session.run("pytest", f"{BENCHMARKS}/tests", f"--confcutdir={BENCHMARKS}", *session.posargs)


@nox.session(tags=["bench"])
def bench(session: nox.Session) -> None:
    """Measure what the suite costs, beside others; `-- [WORKLOAD] [--json FILE] [--against FILE]`, `-- counts [--write]`."""
    install(session, "test", "bench", packages=BENCHED)
    run_benchmarks(session, "bench.json", *session.posargs)


@nox.session(name="bench-fastapi-sqla", tags=["bench"])
def bench_fastapi_sqla(session: nox.Session) -> None:
    """Measure beside fastapi-sqla, which needs an older FastAPI than the others, in an environment of its own."""
    session.install("fastapi-sqla>=4,<5", *nox.project.dependency_groups(PYPROJECT, "test"))
    session.install(*(f"-epackages/{name}" for name in FRAMEWORKS["fastapi"]))
    asked = session.posargs or ["no-db-fastapi", "query", "empty"]
    run_benchmarks(session, "bench-fastapi-sqla.json", "--only", "fastapi_sqla", *asked)


@nox.session(name="bench-page", tags=["bench"])
def bench_page(session: nox.Session) -> None:
    """Write docs/reference/benchmarks.md and its plots from what the last two sessions have measured, or from `-- FILE...`."""
    install(session, "test", "bench", packages=BENCHED)
    measured = session.posargs or [str(path) for path in sorted(MEASURED.glob("*.json"), key=lambda path: path.stem)]
    session.run("python", "-m", "benchmarks", "page", *measured, env={"PYTHONPATH": "integration-tests"})


@nox.session(python=False)
def results(session: nox.Session) -> None:
    """Join what the contract sessions have seen, or `-- FILE...`, into one table; `-- --by-server` puts the drivers together."""
    named = any(one.endswith(".json") for one in session.posargs)
    files = [] if named else sorted(map(str, RESULTS.glob("*.json")))
    session.run(sys.executable, "integration-tests/support/results.py", *session.posargs, *files, external=True)


@nox.session(tags=["ci"])
def coverage(session: nox.Session) -> None:
    """Measure the branches of core and adapters that unit tests and contract reach."""
    install(session, "test", "servers", "clusters", packages=PACKAGES)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *(f"packages/{name}/tests" for name in PACKAGES))
    for framework in FRAMEWORKS:
        session.run("coverage", "run", "-m", "pytest", "integration-tests/contract", f"--framework={framework}")
    run_hosts(session, with_coverage=True)
    session.run("coverage", "combine")
    session.run("coverage", "report", "--fail-under=96")


@nox.session
def demo(session: nox.Session) -> None:
    """Start an example; `-- --framework NAME` chooses which, `-- --check` makes the requests itself and ends.

    `-- --cluster` starts a primary with two replicas and the application on them, `-- --failover` kills that primary under load.
    """
    parser = argparse.ArgumentParser(prog="nox -s demo --", add_help=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--framework", choices=FRAMEWORKS, default="fastapi")
    what.add_argument("--cluster", action="store_true")
    what.add_argument("--failover", action="store_true")
    chosen, others = parser.parse_known_args(session.posargs)
    if chosen.failover:  # beside a session with --cluster, whose environment is left alone; it needs nothing of it
        session.run(sys.executable, "examples/primary_replica/failover.py", *others, external=True)
    elif chosen.cluster:
        install(session, "demo", "demo-cluster", packages=[*FRAMEWORKS["fastapi"], "context-sqla-hosts"])
        session.run("python", "examples/primary_replica/cluster.py", *others)
    else:
        install(session, "demo", packages=FRAMEWORKS[chosen.framework])
        session.run("python", f"examples/{chosen.framework}/app.py", *others)


def built(session: nox.Session) -> Path:
    """Return the folder with the distributions: the one that DIST names, or dist/, newly built."""
    if given := os.environ.get("DIST"):
        return Path(given)
    session.run("uv", "build", "--quiet", "--clear", "--all-packages", "--out-dir", "dist")
    return Path("dist")


def run_unit_tests(session: nox.Session, *others: str) -> None:
    """Run the unit tests of all packages but the pytest plugin's, and others."""
    tests = [f"packages/{name}/tests" for name in PACKAGES if name != PYTEST]
    session.run("pytest", *tests, *others, "--numprocesses=auto", *session.posargs)


def run_benchmarks(session: nox.Session, name: str, *options: str) -> None:
    """Run benchmarks, and keep the results for the page unless they are to go elsewhere or are of a part only."""
    keep = [] if session.posargs else ["--json", str(MEASURED / name)]
    session.run("python", "-m", "benchmarks", *options, *keep, env={"PYTHONPATH": "integration-tests"})


def run_contract(session: nox.Session, framework: str, kind: str, *options: str) -> None:
    """Run the contract on one framework, and keep what was seen unless only a part of it was asked for."""
    keep = [] if session.posargs else ["--support-table", f"--support-results={RESULTS / f'{framework}-{kind}.json'}"]
    chosen = [f"--framework={framework}", f"--numprocesses={WORKERS}", *options, *keep, *session.posargs]
    session.run("pytest", "integration-tests/contract", *chosen)


def run_hosts(session: nox.Session, *options: str, with_coverage: bool = False) -> None:
    """Install Patroni into build/, for it takes no rights, and run the acceptance of context-sqla-hosts."""
    session.run("python", "-m", "hosts.programs", env={"PYTHONPATH": "integration-tests"})
    pytest = ["coverage", "run", "-m", "pytest"] if with_coverage else ["pytest"]
    session.run(*pytest, HOSTS, f"--confcutdir={HOSTS}", *options)


def install(session: nox.Session, *groups: str, packages: list[str] | None = None, versions: Versions = "locked") -> None:
    """Install groups of tools and packages of the workspace: editable, or the wheels in the folder that DIST names."""
    wanted = [*nox.project.dependency_groups(PYPROJECT, *groups)]
    for name in packages or []:
        if dist := os.environ.get("DIST"):
            wanted.append(_wheel(session, Path(dist), name))
        else:
            wanted += ["-e", f"packages/{name}"]
    if session.venv_backend == "uv" and versions == "locked":
        wanted += ["--constraint", _locked_versions(session)]
    elif versions != "locked":
        if session.venv_backend != "uv":
            session.skip("only uv resolves to other versions than pip's")
        wanted += {
            "lowest": ["--resolution=lowest-direct"],
            "newest": ["--upgrade"],
            "prerelease": ["--upgrade", "--prerelease=allow"],
        }[versions]
    session.install(*wanted)


def _wheel(session: nox.Session, dist: Path, name: str) -> str:
    """Return the one wheel of a package, without which its sources would not be tested by anybody."""
    found = list(dist.glob(f"{name.replace('-', '_')}-[0-9]*.whl"))
    if len(found) != 1:
        session.error(f"DIST={dist}: {len(found)} wheels of {name}")
    return str(found[0])


def _locked_versions(session: nox.Session) -> str:
    """Write the versions of uv.lock as constraints, which pip and uv both read."""
    path = str(Path(session.create_tmp(), "constraints.txt"))
    what = ["--all-packages", "--all-groups", "--no-emit-workspace", "--no-hashes", "--no-annotate", "--no-header"]
    session.run_install("uv", "export", "--quiet", "--frozen", *what, "--output-file", path, silent=True)
    return path
