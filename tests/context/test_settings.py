"""How a service is set: what its parts get of that."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from aos_context.config import Config
from aos_context.errors import SchemaError
from aos_context.opening import opened
from aos_context.scratch import scratch
from aos_context.settings import Settings

from tests.context import OVERLAY
from tests.context.served import FACT

if TYPE_CHECKING:
    from pathlib import Path


def test_the_memory_has_the_limits_that_the_service_has(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path / "runs", config=Config(batch_max_changes=1))
    with opened(settings) as runs:
        run = runs.open(runs.boot("Remember little.")["run_id"])
        with pytest.raises(SchemaError, match="1 to 1 items"):
            run.propose([FACT, FACT | {"content": "one too many"}])


KILLED = """
import os, sys
from pathlib import Path
from aos_context import pack_content, resume_pack
from aos_context.memory import InMemoryMemoryStore
from aos_context.runs import Runs
setattr(resume_pack, sys.argv[3], lambda *_: os._exit(9))
Runs(Path(sys.argv[1]), memory=InMemoryMemoryStore()).load_file(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("killed_at", ["verify", "_move"])
def test_what_killed_loaders_left_in_the_folder_of_runs_is_removed_when_it_is_opened(
    tmp_path: Path, killed_at: str
) -> None:
    root = tmp_path / "runs"
    with opened(Settings(root=root)) as runs:
        pack = runs.open(runs.boot("Be carried.")["run_id"]).snapshot().path
    command = [sys.executable, "-c", KILLED, str(root), str(pack), killed_at]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    ended = subprocess.run(command, cwd=OVERLAY, env=os.environ | {"TMPDIR": str(temporary)}, check=False)
    assert ended.returncode == 9
    assert list(root.glob(".making-*"))
    assert list(temporary.iterdir()) == []
    with scratch(root) as in_use, opened(Settings(root=root)):
        assert list(root.glob(".making-*")) == [in_use]
