"""What a script imports is loaded before its calls, as far as nothing can tell; the rest is left to the calls."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from runners.helper import LAUNCH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RUNNERS = LAUNCH.parent
DRIVER = """
import sys
given = sys.stdin.read()
sys.path[0] = {runners!r}
import json, zygote
del sys.path[0], sys.modules["zygote"]
try:
    program = zygote.prepare(*json.loads(given))
    found = dict(loaded=program.loaded, left=program.left, unclean=program.unclean, modules=sorted(sys.modules))
except zygote.UnfitError as error:
    found = dict(unfit=str(error))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` came to in a process of its own."""

    loaded: list[str]
    left: dict[str, str]
    unclean: dict[str, str]
    modules: list[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An overlay's folder. `installed` beside it is where its libraries are."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "overlay").mkdir()
    return tmp_path / "overlay"


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def ask(folder: Path, arguments: Sequence[str], preload: Sequence[str], skip: Sequence[str]) -> dict[str, Any]:
    driver = folder.parent / "driver.py"
    driver.write_text(DRIVER.format(runners=str(RUNNERS)))
    process = subprocess.run(
        [sys.executable, str(driver)],
        input=json.dumps([arguments, preload, skip, str(folder.parent)]),
        cwd=folder,
        env={"PYTHONPATH": str(folder.parent / "installed"), "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def prepare(folder: Path, script: str, preload: Sequence[str] = (), skip: Sequence[str] = ()) -> Prepared:
    write(folder, {"run.py": script})
    return Prepared(**ask(folder, ["run.py"], preload, skip))


def install(folder: Path, **modules: str) -> None:
    write(folder.parent / "installed", {f"{name}.py": text for name, text in modules.items()})


def test_the_imports_of_a_script_are_loaded_in_their_order(folder: Path) -> None:
    found = prepare(
        folder, '"""Doc."""\nfrom __future__ import annotations\nimport json, colorsys\nfrom os import path\n'
    )
    assert found.loaded == ["json", "colorsys", "os"]
    assert found.unclean == found.left == {}
    assert {"json.decoder", "colorsys"} <= set(found.modules)


def test_nothing_but_what_the_script_imports_is_found_among_the_modules(folder: Path) -> None:
    found = prepare(folder, "import sys\n")
    ours = {path.stem for path in RUNNERS.glob("*.py")}
    assert not ({"json", "ast", "opcode", "__main__"} | ours) & set(found.modules)


def test_a_module_that_is_wanted_by_name_from_a_package_is_loaded(folder: Path) -> None:
    assert "xml.dom.minidom" in prepare(folder, "from xml.dom import minidom\n").modules


HARMLESS = [
    "x = 1",
    "x, (y, z) = 1, (2, 3)",
    "x: int = 3",
    "x: int",
    "x = {'a': [1, *range(3)], 'b': f'{1}' + 'c'}",
    "x = [str(n) for n in range(3) if n]",
    "x = lambda: launch()",
    "'a string'",
    "pass",
    "def f(a, b=1, *, c=None):\n    launch()",
    "async def f():\n    await launch()",
    "class A(Exception, metaclass=type):\n    x = 1\n    def f(self):\n        launch()",
    "import functools\n@functools.lru_cache(maxsize=None)\ndef f():\n    launch()",
    "from dataclasses import dataclass, field\n@dataclass(frozen=True)\nclass A:\n    x: int = field(default=1)",
    "class A:\n    @property\n    def x(self): ...\n    @x.setter\n    def x(self, value): ...",
    "import logging\nlog = logging.getLogger(__name__)",
    "from pathlib import Path\nHERE = Path(__file__).resolve().parent",
    "import os\nHOME = os.environ.get('HOME') or os.path.join('a', 'b')",
    "import warnings\nwarnings.filterwarnings('ignore')",
    "print('hello')",
    "if 1 + 1 == 2:\n    x = 1\nelse:\n    x = 2",
    "import typing\nif typing.TYPE_CHECKING:\n    import no_such_module",
    "import sys\nif sys.version_info >= (3, 0):\n    x = 1\nelse:\n    import no_such_module",
    "try:\n    import no_such_module\nexcept (ImportError, ValueError):\n    no_such_module = None",
    "try:\n    import json\nexcept ImportError:\n    import no_such_module\nelse:\n    x = 1\nfinally:\n    y = 2",
]


@pytest.mark.parametrize("statement", HARMLESS)
def test_reading_goes_on_after_what_only_defines(folder: Path, statement: str) -> None:
    found = prepare(folder, f"{statement}\nimport colorsys\n")
    assert found.loaded[-1] == "colorsys"
    assert found.left == {}


EFFECTS = [
    "launch()",
    "x = launch()",
    "import os\nos.environ['X'] = '1'",
    "import os\nos.environ.setdefault('X', '1')",
    "import sys\nsys.path += ['lib']",
    "import sys\nsys.path.insert(0, 'lib')",
    "import sys\nsys.argv = []",
    "def f(a=launch()): ...",
    "@launch\ndef f(): ...",
    "@launch.now(1)\nclass A: ...",
    "class A(launch()): ...",
    "class A:\n    launch()",
    "x = [launch() for _ in range(3)]",
    "import warnings\nwarnings.simplefilter('error')",
    "if launch():\n    x = 1",
    "if undecided:\n    import os",
    "try:\n    launch()\nexcept ValueError:\n    pass",
    "for x in range(3):\n    pass",
    "with launch():\n    pass",
    "del x",
    "from . import x",
    "import no_such_module",
    "try:\n    import no_such_module\nexcept ValueError:\n    pass",
]


@pytest.mark.parametrize("statement", EFFECTS)
def test_reading_ends_where_something_is_done(folder: Path, statement: str) -> None:
    found = prepare(folder, f"{statement}\nimport colorsys\n")
    assert "colorsys" not in found.loaded
    assert "colorsys" in found.left
    assert found.unclean == {}


def test_what_is_left_says_behind_which_line_it_stands(folder: Path) -> None:
    found = prepare(folder, "import json\n\nlaunch()\nimport colorsys\n")
    assert found.loaded == ["json"]
    assert "line 3 of run.py" in found.left["colorsys"]


OWN = {
    "helper.py": "import colorsys\nfrom inner import tool\nopen('ran', 'w')\n",
    "inner/__init__.py": "import bisect\n",
    "inner/tool.py": "from . import other\nfrom .other import x\nimport calendar\n",
    "inner/other.py": "import inner.tool, chunk_of_work\nx = 1\n",
    "chunk_of_work.py": "import json\n",
}


def test_an_overlays_own_modules_are_read_and_never_run(folder: Path) -> None:
    write(folder, OWN)
    found = prepare(folder, "import helper\nimport csv\n")
    assert found.loaded == ["colorsys", "bisect", "json", "calendar"]
    assert set(found.left) == {"helper", "inner", "inner.tool", "inner.other", "chunk_of_work", "csv"}
    assert "line 3 of " in found.left["csv"]
    assert not (folder / "ran").exists()
    assert not set(found.modules) & {"helper", "inner", "inner.tool", "chunk_of_work"}


def test_a_module_of_the_overlays_virtual_environment_counts_as_installed(folder: Path) -> None:
    write(folder, {".venv/lib/library.py": "x = 1\n"})
    (folder.parent / "installed").rmdir()
    (folder.parent / "installed").symlink_to(folder / ".venv" / "lib")
    assert prepare(folder, "import library\n").loaded == ["library"]


def test_an_own_extension_cannot_be_read_and_ends_the_reading(folder: Path) -> None:
    (folder / "native.so").write_bytes(b"")
    found = prepare(folder, "import native\nimport json\n")
    assert found.loaded == []
    assert "json" in found.left


def test_preload_names_what_else_is_loaded_even_of_the_overlay(folder: Path) -> None:
    write(folder, {"helper.py": "import inner\n", "inner.py": "x = 1\n"})
    found = prepare(folder, "launch()\nimport helper\n", preload=["colorsys", "helper", "no_such_module"])
    assert found.loaded == ["colorsys", "helper"]
    assert found.left == {"no_such_module": "there is no module no_such_module"}
    assert "inner" in found.modules


def test_an_own_module_that_a_library_would_get_instead_of_its_own_is_not_run(folder: Path) -> None:
    write(folder, {"colorsys.py": "open('ran', 'w')\n"})
    install(folder, library="import colorsys\n")
    found = prepare(folder, "import library\n")
    assert "colorsys, which is the overlay's own" in found.unclean["library"]
    assert not (folder / "ran").exists()


UNCLEAN = {
    "thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n",
        "starts threads",
    ),
    "socket": ("import socket\nkept = socket.socketpair()\n", "leaves something open"),
    "file": ("kept = open(__file__)\n", "leaves something open"),
    "stdout": ("print('hello')\n", "writes to stdout or stderr"),
    "much on stdout": ("print('hello' * 2**20)\n", "writes to stdout or stderr"),
    "log": ("import warnings\nwarnings.warn('old')\n", "writes to stdout or stderr"),
    "child": ("import subprocess\nsubprocess.run(['true'])\n", "starts a process"),
    "variable": ("import os\nos.environ['X'] = '1'\n", "changes the environment"),
    "folder": ("import os\nos.chdir('/')\n", "changes the working folder"),
    "umask": ("import os\nos.umask(0o077)\n", "changes the umask"),
    "handler": ("import signal\nsignal.signal(signal.SIGTERM, print)\n", "changes how signals are handled"),
    "mask": ("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [10])\n", "changes how signals are handled"),
    "timer": ("import signal\nsignal.setitimer(signal.ITIMER_REAL, 100)\n", "sets a timer"),
    "chance": ("import random\nsource = random.Random()\n", "makes a source of random numbers"),
    "error": ("import json\n1 / 0\n", "does not load: ZeroDivisionError"),
    "exit": ("import sys\nsys.exit(3)\n", "does not load: SystemExit: 3"),
    "needs": ("import no_such_module\n", "No module named 'no_such_module'"),
}


@pytest.mark.parametrize("what", UNCLEAN)
def test_a_module_that_does_more_than_define_things_is_found_out(folder: Path, what: str) -> None:
    body, reason = UNCLEAN[what]
    install(folder, library=body)
    found = prepare(folder, "import json\nimport library\nimport colorsys\n")
    assert list(found.unclean) == ["library"]
    assert reason in found.unclean["library"]
    assert "colorsys" not in found.loaded


def test_a_process_started_anew_leaves_alone_what_was_unclean_and_what_follows_it(folder: Path) -> None:
    install(folder, library="print('hello')\n")
    found = prepare(folder, "import json\nimport library.part\nimport colorsys\n", ["bisect"], skip=["library"])
    assert found.loaded == ["json", "bisect"]
    assert found.unclean == {}
    assert found.left == {
        "library.part": "it does more than define things",
        "colorsys": "it stands behind the import of library.part",
    }


THREAD_THAT_ENDS_AT_FORK = """
import os, threading
end = threading.Event()
thread = threading.Thread(target=end.wait, daemon=True)
thread.start()
def before():
    end.set()
    thread.join()
os.register_at_fork(before=before)
"""


def test_threads_that_a_library_puts_away_before_a_fork_do_no_harm(folder: Path) -> None:
    install(folder, library=THREAD_THAT_ENDS_AT_FORK)
    found = prepare(folder, "import library\n")
    assert found.loaded == ["library"]
    assert found.unclean == {}


def test_a_thread_or_file_that_is_gone_after_the_import_does_no_harm(folder: Path) -> None:
    body = "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()\nopen(__file__).close()\n"
    install(folder, library=body)
    assert prepare(folder, "import library\n").unclean == {}


UNFIT = {
    "no file": (["missing.py"], "missing.py cannot be read: No such file"),
    "a folder": (["package"], "is a folder or an archive"),
    "an archive": (["archive.pyz"], "is a folder or an archive"),
    "no Python": (["broken.py"], "broken.py cannot be compiled"),
    "bytecode": (["bytes.pyc"], "bytes.pyc cannot be compiled"),
    "no module": (["-m", "missing"], "there is no module missing"),
    "no part": (["-m", "package.missing"], "there is no module package.missing"),
    "a package that is no program": (["-m", "package"], "there is no module package.__main__"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_script_that_cannot_be_forked_is_refused_with_the_reason(folder: Path, what: str) -> None:
    import zipfile  # noqa: PLC0415

    write(folder, {"package/__init__.py": "", "broken.py": "if:\n"})
    (folder / "bytes.pyc").write_bytes(b"\x00\x01\x02\x03")
    with zipfile.ZipFile(folder / "archive.pyz", "w") as archive:
        archive.writestr("__main__.py", "print(1)")
    arguments, reason = UNFIT[what]
    assert reason in ask(folder, arguments, [], [])["unfit"]


def test_a_module_is_read_like_a_script_and_its_package_before_it(folder: Path) -> None:
    write(
        folder, {"pkg/__init__.py": "import colorsys\n", "pkg/tool.py": "from . import more\nimport json\nlaunch()\n"}
    )
    write(folder, {"pkg/more.py": "import bisect\nif __name__ == '__main__':\n    launch()\n"})
    found = Prepared(**ask(folder, ["-m", "pkg.tool"], [], []))
    assert found.loaded == ["colorsys", "bisect", "json"]
    assert "runpy" in found.modules
    assert "pkg" not in found.modules


def test_a_script_that_defeats_the_reader_leaves_everything_to_the_calls(folder: Path) -> None:
    found = prepare(folder, f"import json\nx = {'1 + ' * 700}1\n")
    assert found.loaded == []
    assert found.left == {"run.py": "it could not be read"}
