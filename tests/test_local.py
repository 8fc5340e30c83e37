"""A Bus for code without an event loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bus.errors import SettingError
from bus.local import LocalBus
from tests.support import add_native, add_overlay, calls

if TYPE_CHECKING:
    from bus.settings import Settings


def test_a_call_names_its_capability_behind_a_dot(settings: Settings) -> None:
    add_native(settings.overlays, "two", {name: {"runner": "proc", "phases": ["OPEN"]} for name in ("one", "other")})
    with LocalBus(settings) as bus:
        assert bus.call("two.other", {"n": 1})["result"]["capability"] == "other"
        assert bus.call("two", {})["code"] == "ERR_UNKNOWN_CAPABILITY"


def test_a_request_that_cannot_be_read_is_answered_and_written_down(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    with LocalBus(settings) as bus:
        answer = bus.invoke({"phase": "NOPE"}, "echo")
    assert (answer.http_status, answer.body["code"]) == (400, "ERR_UNKNOWN_PHASE")
    assert [(line["type"], line["overlay"], line["code"]) for line in calls(settings)] == [
        ("denied", "echo", "ERR_UNKNOWN_PHASE")
    ]


def test_a_start_that_fails_leaves_no_loop_open(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    settings.state.mkdir()
    (settings.state / "overlays.json").write_text("nonsense")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SettingError), LocalBus(settings):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
