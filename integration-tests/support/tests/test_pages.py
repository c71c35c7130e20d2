"""The tables of the documentation are what the suite says."""

import re
from pathlib import Path

import pytest
from contract.drivers import FRAMEWORKS
from support.pages import PAGES, ROOT, filled, main, promises
from support.scenario import Feature

CONTRACT = ROOT / "integration-tests" / "contract"
LACKING = [
    (name, feature, reason)
    for name, row in FRAMEWORKS.items()
    for lacks in (row.lacks, *row.lacks_on.values())
    for feature, reason in lacks.items()
]


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_a_page_are_up_to_date(page):
    """What is declared in one place is what users read; `nox -s support -- --write` writes it."""
    assert (ROOT / page).read_text(encoding="utf-8") == filled(page)


def test_what_is_out_of_date_is_said_or_written(tmp_path, monkeypatch, capsys):
    """A page says what has changed before somebody writes it."""
    for page in PAGES:
        copy = tmp_path / page
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / page).read_text(encoding="utf-8").replace("| P20 Secrets | yes |", "| P20 Secrets | no |"))
    for name in ("packages", "uv.lock", "docs/how-to", "docs/explanation"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr("support.pages.ROOT", tmp_path)

    assert main([]) == 1
    assert "-| P20 Secrets | no |" in capsys.readouterr().out
    assert main(["--write"]) == 0
    assert main([]) == 0


@pytest.mark.parametrize("feature", Feature, ids=lambda feature: feature.name)
def test_every_feature_touches_a_promise(feature):
    """A framework cannot lack what nobody has promised."""
    assert feature.promise in promises()


def test_the_names_of_the_promises_are_complete():
    """The contract's page numbers them as the files of tests do."""
    numbers = {int(re.findall(r"\d+", promise)[0]) for promise in promises()}

    assert numbers == {int(path.name[6:8]) for path in CONTRACT.glob("test_p*.py")} - {0}


@pytest.mark.parametrize(("name", "feature", "reason"), LACKING, ids=lambda value: getattr(value, "name", None))
def test_what_is_lacking_has_a_reason_and_a_test(name, feature, reason):
    """A test of the contract shows what the user gets instead."""
    asking = [path for path in CONTRACT.glob("test_p*.py") if f"Feature.{feature.name}" in path.read_text(encoding="utf-8")]

    assert reason
    assert asking, name


def test_lacks_on_names_servers_of_the_framework():
    """A reason for a server that is not there would never be read."""
    assert [name for name, row in FRAMEWORKS.items() if not set(row.lacks_on) <= set(row.servers)] == []


def test_every_adapter_has_a_row():
    """What has no row is in no table, and none of its promises are tested."""
    packages = {path.parent.name.removeprefix("context-sqla-") for path in Path(ROOT, "packages").glob("*/pyproject.toml")}

    assert packages - set(FRAMEWORKS) <= {"context-sqla", "hosts", "pytest"}
    assert set(FRAMEWORKS) <= packages
