"""Templates: every kind of new overlay is sound, passes the test that it comes with, and is of the kind asked for."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING, get_args

import pytest

from bus import manifests, overlay_programs, templates
from bus.model import Service

if TYPE_CHECKING:
    from pathlib import Path

    from bus.model import Manifest

PORT = 8101


def made(folder: Path, kind: templates.Kind) -> Manifest:
    templates.write(folder, templates.overlay_files(folder.name, kind, PORT))
    return manifests.read(folder)


@pytest.mark.parametrize("kind", get_args(templates.Kind))
def test_a_new_overlay_is_sound_and_passes_its_test(tmp_path: Path, kind: templates.Kind) -> None:
    manifest = made(tmp_path / "my-9-tool", kind)
    assert manifest.warnings == ()
    assert overlay_programs.look(manifest).faults == ()
    command = [sys.executable, "-W", "error", templates.path_of_test("my-9-tool")]
    ran = subprocess.run(command, cwd=manifest.folder, capture_output=True, text=True, check=False)
    assert (ran.returncode, "Ran 2 tests" in ran.stderr) == (0, True), ran.stderr


def test_a_new_overlay_runs_as_its_kind_says(tmp_path: Path) -> None:
    found = {kind: made(tmp_path / kind, kind) for kind in get_args(templates.Kind)}
    assert [manifest.mode for manifest in found.values()] == ["auto", "worker", "auto", "auto"]
    assert {kind: manifest.service for kind, manifest in found.items() if manifest.service} == {
        "service": Service(("python3", "service.py"))
    }
    urls = [manifest.capabilities["count"].url for manifest in found.values()]
    assert urls == ["", "", f"http://127.0.0.1:{PORT}/count", "/count"]


@pytest.mark.parametrize("kind", ["http", "service"])
def test_a_new_service_listens_on_the_port_that_the_bus_gives_it(tmp_path: Path, kind: templates.Kind) -> None:
    folder = made(tmp_path / "counter", kind).folder
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command, env = [sys.executable, "service.py"], {"OVERLAY_PORT": str(port)}
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        said = service.stdout.readline()
        service.kill()
    assert said == f"counter listens on http://127.0.0.1:{port}\n"
