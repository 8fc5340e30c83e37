"""Where the server of a folder is, and when that is believed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bus.errors import SettingError
from bus.model import Phase
from bus.server_lock import folder_lock
from bus.serving import Serving, announced, find
from bus.tokens import SCOPES, Tokens
from tests.support import PATIENCE_S
from tests.test_serve import asked, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / ".aal"


@pytest.fixture
def served(state: Path) -> Iterator[Path]:
    """The file of a folder that this process serves."""
    with folder_lock(state), announced(state, ADDRESS):
        yield state / "serving.json"


def test_no_folder_is_served_by_nobody(state: Path) -> None:
    assert find(state) is None
    assert not state.exists()


def test_a_server_is_found_as_long_as_it_serves(state: Path, served: Path) -> None:
    assert find(state) == Serving(ADDRESS, os.getpid())
    assert stat.S_IMODE(served.stat().st_mode) == 0o600


def test_the_file_goes_with_the_server(state: Path) -> None:
    with folder_lock(state), announced(state, ADDRESS):
        pass
    assert not (state / "serving.json").exists()


def test_what_a_killed_server_has_left_is_not_believed(state: Path, served: Path) -> None:
    left = served.read_text()
    with folder_lock(state.parent / "other"):
        pass
    other = state.parent / "other" / "serving.json"
    other.write_text(left)
    other.chmod(0o600)
    assert find(other.parent) is None  # the process lives, but holds no lock there


def test_a_lock_that_another_process_holds_is_not_the_servers(state: Path, served: Path) -> None:
    served.write_text(json.dumps({"address": ADDRESS, "pid": os.getppid()}))
    assert find(state) is None


def test_a_kernel_that_lists_no_locks_has_none_believed(state: Path, served: Path) -> None:
    assert served.exists()
    assert find(state, locks=Path("/nowhere")) is None


@pytest.mark.parametrize("text", ["", "[]", '{"address": "http://x:1"}', '{"address": "file:///etc", "pid": 1}'])
def test_a_file_that_makes_no_sense_is_refused_and_replaced_by_the_next_server(
    state: Path, served: Path, text: str
) -> None:
    served.write_text(text)
    with pytest.raises(SettingError, match=r"serving\.json"):
        find(state)
    with announced(state, ADDRESS):
        assert find(state) == Serving(ADDRESS, os.getpid())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_the_address_of_a_server_is_one_that_it_answers_by(tmp_path: Path, host: str) -> None:
    Tokens(tmp_path / ".aal").create("ci", overlays=("*",), phases=tuple(Phase), scopes=SCOPES)
    with serving(tmp_path, host=host) as (server, _):
        found = find(tmp_path / ".aal")
        assert found is not None
        assert found.pid == server.pid
        assert asked(found.address.removeprefix("http://"), "GET", "/ready") == (200, {"ready": True})
        server.terminate()
        server.communicate(timeout=PATIENCE_S)
    assert find(tmp_path / ".aal") is None
    assert not (tmp_path / ".aal/serving.json").exists()
