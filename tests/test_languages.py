"""Any language does: the same call through the whole bus to overlays in Python, bash, Node and C."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from bus.local import LocalBus
from tests import programs
from tests.support import add_overlay

if TYPE_CHECKING:
    from bus.settings import Settings

TEXT = "žluťoučký kůň, 馬, 🐎"
LANGUAGES = {
    "python": ("python3", "echo.py", "python3 echo.py"),
    "bash": ("bash", "echo.sh", "bash echo.sh"),
    "node": ("node", "echo.js", "node echo.js"),
    "c": ("cc", "echo.c", "./echo"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_overlay_may_be_written_in(settings: Settings, language: str) -> None:
    needs, source, entrypoint = LANGUAGES[language]
    if shutil.which(needs) is None:
        pytest.skip(f"there is no {needs}")
    folder = add_overlay(settings.overlays, language, entrypoint)
    shutil.copy(programs.FOLDER / source, folder)
    if language == "c":
        subprocess.run(["cc", "-o", folder / "echo", folder / source], check=True)
    with LocalBus(settings) as bus:
        answer = bus.call(language, {"text": TEXT}, seed=1)
        assert answer["ok"], answer
        assert TEXT in json.dumps(answer["result"], ensure_ascii=False)
        assert answer["provenance"]["seq"] == 1
