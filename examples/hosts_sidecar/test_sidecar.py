"""The image and the manifest are what the sidecar understands: they are parsed, their variables are read, their commands run."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from context_sqla_hosts import Hosts

HERE = Path(__file__).parent
KNOWN = {"ARG", "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER"}


def instructions() -> list[tuple[str, str]]:
    """Read a Containerfile: one instruction a line, or on several that end with a backslash; comments left out."""
    text = (HERE / "Containerfile").read_text("utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def only(name: str) -> str:
    found = [rest for instruction, rest in instructions() if instruction == name]
    assert len(found) == 1
    return found[0]


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all((HERE / "sidecar.yaml").read_text("utf-8"))}


def pod() -> dict[str, Any]:
    found: dict[str, Any] = documents()["Deployment"]["spec"]["template"]["spec"]
    return found


def sidecar() -> dict[str, Any]:
    (found,) = pod()["initContainers"]
    assert isinstance(found, dict)
    return found


def environment() -> dict[str, str]:
    return {one["name"]: one["value"] for one in sidecar()["env"]}


@contextlib.contextmanager
def running(command: list[str], variables: dict[str, str]) -> Iterator[str]:
    """Start the command of the image, for hosts that are not there, and give the port on which it listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        hosts = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, and nobody listens
        variables = {**os.environ, **variables, "CONTEXT_SQLA_HOSTS_HOSTS": hosts, "CONTEXT_SQLA_HOSTS_LISTEN": "127.0.0.1:0"}
        with subprocess.Popen([sys.executable, *command[1:]], env=variables, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said = ""
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", said)) or " is dead" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            yield found[1]
            process.terminate()
            process.communicate(timeout=20)
        assert process.returncode == 0


def passes(command: list[str], port: str) -> bool:
    """Run a probe for the port on which it really listens."""
    assert command[0] == "python"
    assert "127.0.0.1:8000/" in command[-1]
    here = [sys.executable, *command[1:-1], command[-1].replace("127.0.0.1:8000/", f"127.0.0.1:{port}/")]
    return subprocess.run(here, check=False, capture_output=True, timeout=20).returncode == 0


def test_the_image_has_no_rights_and_no_secret() -> None:
    """A fixed base, a user that is not root, nothing that should not be in a layer."""
    found = instructions()

    assert {name for name, _ in found} <= KNOWN
    assert found[0][0] == "FROM"
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim", only("FROM"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", only("USER"))
    assert [name for name, _ in found].index("USER") > [name for name, _ in found].index("RUN")
    assert only("EXPOSE") == "8000"
    assert not re.search(
        "password|secret", " ".join(rest for name, rest in found if name in ("ARG", "ENV", "RUN")), re.IGNORECASE
    )


def test_the_image_installs_what_the_command_needs() -> None:
    """The distribution, with an extra that it has, and no cache."""
    project = (HERE.parents[1] / "packages" / "context-sqla-hosts" / "pyproject.toml").read_text("utf-8")

    assert only("RUN") == 'pip install --no-cache-dir "context-sqla-hosts[asyncpg]${VERSION:+==$VERSION}"'
    assert "\nasyncpg = [" in project


def test_the_command_of_the_image_serves() -> None:
    """And its health check finds it."""
    command = [*json.loads(only("ENTRYPOINT")), *json.loads(only("CMD"))]
    check = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    with running(command, {}) as port:
        assert passes(check, port)
    assert not passes(check, port)


def test_the_manifest_is_whole() -> None:
    """Selectors find their pods, volumes are there, and so is the secret."""
    every = documents()
    spec = every["Deployment"]["spec"]
    volumes = {volume["name"] for volume in pod()["volumes"]}
    secrets = {volume["secret"]["secretName"] for volume in pod()["volumes"] if "secret" in volume}

    assert {(every[kind]["apiVersion"], kind) for kind in every} == {("v1", "Secret"), ("apps/v1", "Deployment")}
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert {mount["name"] for mount in sidecar()["volumeMounts"]} == volumes
    assert secrets == {every["Secret"]["metadata"]["name"]}


def test_the_sidecar_of_the_manifest_is_one() -> None:
    """It starts before the application and runs beside it, without rights, within bounds."""
    security = sidecar()["securityContext"]

    assert sidecar()["restartPolicy"] == "Always"
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert all("memory" in container["resources"]["limits"] for container in (sidecar(), *pod()["containers"]))
    assert all(mount["readOnly"] for mount in sidecar()["volumeMounts"])


def test_the_variables_of_the_manifest_are_understood(tmp_path: Path) -> None:
    """A misspelt one would be ignored in silence; the password comes from the mounted secret."""
    variables = environment()
    file = Path(variables["CONTEXT_SQLA_HOSTS_PASSWORD_FILE"])
    mounts = {mount["mountPath"]: mount["name"] for mount in sidecar()["volumeMounts"]}
    page = (HERE.parents[1] / "docs" / "how-to" / "hosts-sidecar.md").read_text("utf-8")
    listed = subprocess.run(
        [sys.executable, "-m", "context_sqla_hosts", "serve", "--help"], check=True, capture_output=True, text=True
    ).stdout
    options = {f"CONTEXT_SQLA_HOSTS_{name.upper().replace('-', '_')}" for name in re.findall(r"--([a-z-]+)", listed)}

    assert {name for name in variables if name.startswith("CONTEXT_")} <= options
    assert all(name in page for name in variables if name.startswith("PG"))
    assert len(Hosts.from_env(variables).snapshot().hosts) == 3
    assert ip_address(variables["CONTEXT_SQLA_HOSTS_LISTEN"].rpartition(":")[0]).is_loopback
    assert mounts[str(file.parent)] == documents()["Secret"]["metadata"]["name"]
    assert file.name in documents()["Secret"]["stringData"]
    assert not any(re.search("PASSWORD$", name) for name in variables)


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_the_probes_of_the_manifest_find_the_sidecar(probe: str) -> None:
    """They run inside, for the kubelet cannot reach the pod's loopback; a missing host makes none of them fail."""
    command = [*json.loads(only("ENTRYPOINT")), *sidecar()["args"]]
    with running(command, {}) as port:
        assert passes(sidecar()[probe]["exec"]["command"], port)
