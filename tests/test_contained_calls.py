"""A helper takes on what its plan says, and its calls have their places and their limits, by its own messages."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from runners.helper import LAUNCH
from runners.watching import RARELY_S
from tests.programs import a_plan
from tests.programs.a_bare_helper import BareHelper
from tests.programs.a_home import children
from tests.support import PATIENCE_S
from tests.test_launcher import interpreters
from tests.test_sandbox import landlock_abi

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = (sys.executable, "-I", "-S")
SYSTEM = [path for path in ("/bin", "/usr", "/lib", "/lib64") if Path(path).exists()]


@pytest.fixture(params=["namespace", "subreaper"])
def namespace(request: pytest.FixtureRequest) -> bool:
    """Whether the helpers have one."""
    wanted = request.param == "namespace"
    if wanted:
        need_namespace()
    return bool(wanted)


def need_namespace() -> None:
    with BareHelper(None, namespace=True) as helper:
        verb, given = helper.heard()
    if verb == "no_namespace":
        pytest.skip(f"this kernel gives no pid namespace: {given}")


@contextmanager
def a_helper(plan: Any, *, namespace: bool, script: Path | None = None) -> Iterator[BareHelper]:
    interpreter, arguments = ((), None) if script is None else (PYTHON, (str(script),))
    with BareHelper(plan, namespace=namespace, interpreter=interpreter, arguments=arguments) as helper:
        yield helper


def python(code: str) -> list[str]:
    return [*PYTHON, "-c", code]


# What is taken


def test_it_says_what_was_taken_and_what_was_not(namespace: bool, tmp_path: Path) -> None:
    plan = a_plan.a_plan(tmp_path, capabilities=0, limits=[[resource.RLIMIT_CORE, 0], [99, 0]])
    with a_helper(plan, namespace=namespace) as helper:
        contained = helper.until_ready()
    assert contained == {"namespace": namespace, "taken": ["capabilities"], "failed": {"limits": "resource 99"}}


def test_a_strict_plan_that_cannot_be_taken_ends_it(namespace: bool, tmp_path: Path) -> None:
    plan = a_plan.a_plan(tmp_path, capabilities=0, limits=[[99, 0]], strict=True)
    with a_helper(plan, namespace=namespace) as helper:
        assert helper.heard() == ["unheld", {"limits": "resource 99"}]
        assert helper.heard() is None


def test_a_place_that_cannot_be_made_is_named(namespace: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with a_helper(a_plan.a_plan(tmp_path / "file" / "root"), namespace=namespace) as helper:
        verb, (number, words) = helper.heard()
    assert (verb, number) == ("not_started", errno.ENOTDIR)
    assert words.startswith(f"{tmp_path}/file/root")


@pytest.mark.skipif(landlock_abi() < 1, reason="this kernel has no Landlock")
@pytest.mark.parametrize("data_bytes", [0, 100 << 20])
def test_it_starts_programs_where_it_can_read_nothing_of_its_own(
    namespace: bool, tmp_path: Path, data_bytes: int
) -> None:
    rules = a_plan.landlock(("/proc", a_plan.READ_FILE | a_plan.READ_DIR))
    rules["paths"] += [[path, a_plan.EXECUTE | a_plan.READ_FILE] for path in SYSTEM]
    with a_helper(a_plan.a_plan(tmp_path, landlock=rules), namespace=namespace) as helper:
        assert helper.until_ready()["taken"] == ["landlock"]
        for _ in range(2):
            assert helper.run(["echo", "hello"], data_bytes)[0] == "hello\n"
        _, (_, status, *_) = helper.run(["/bin/sh", "-c", f"read line < {__file__}"])
    assert os.waitstatus_to_exitcode(status) != 0


@pytest.mark.skipif(landlock_abi() < 1, reason="this kernel has no Landlock")
def test_a_script_is_forked_where_only_its_own_interpreter_can_be_read(namespace: bool, tmp_path: Path) -> None:
    other = next(
        (path for path in map(Path, interpreters()) if path.resolve().parent.parent != Path(sys.base_prefix).resolve()),
        None,
    )
    if other is None:
        pytest.skip("there is no interpreter in another place than ours")
    script = tmp_path / "run.py"
    script.write_text("print('hello')")
    readable = [LAUNCH.parent, script, other.parent.parent / "lib", "/proc", *SYSTEM]
    rules = a_plan.landlock((other, a_plan.EXECUTE | a_plan.READ_FILE))
    rules["paths"] += [[str(path), a_plan.EXECUTE | a_plan.READ_FILE | a_plan.READ_DIR] for path in readable]
    plan = a_plan.a_plan(tmp_path / "root", landlock=rules)
    with BareHelper(
        plan, namespace=namespace, interpreter=(str(other), "-I", "-S"), arguments=(str(script),)
    ) as helper:
        helper.until_ready()
        assert helper.run([str(script)])[0] == "hello\n"


LATE = """
import os
try:
    os.execv("/bin/true", ["true"])
except OSError as error:
    print(error.errno)
"""


@pytest.mark.skipif(platform.machine() not in a_plan.EXECVE, reason="the number of execve is not known here")
@pytest.mark.parametrize("interpreter", list(interpreters()))
def test_a_script_has_lost_what_its_interpreter_needed_to_start(
    namespace: bool, tmp_path: Path, interpreter: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(LATE)
    plan = a_plan.a_plan(tmp_path / "root", late=a_plan.refusing(a_plan.EXECVE[platform.machine()]))
    command: dict[str, Any] = {"interpreter": (interpreter, "-I", "-S"), "arguments": (str(script),)}
    with BareHelper(plan, namespace=namespace, **command) as helper:
        helper.until_ready()
        for _ in range(3):  # the last was forked ahead
            assert helper.run([str(script)])[0] == f"{errno.EPERM}\n"


def test_a_script_whose_late_filter_cannot_be_taken_does_not_run_under_a_strict_plan(
    namespace: bool, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text("")
    with a_helper(
        a_plan.a_plan(tmp_path / "root", late=b"no BPF.." * 2, strict=True), namespace=namespace, script=script
    ) as helper:
        assert helper.heard()[0] == "contained"
        assert helper.heard() == ["unheld", {"seccomp": os.strerror(errno.EINVAL)}]


def test_a_late_filter_that_cannot_be_taken_is_told_and_the_script_runs(namespace: bool, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("print('hello')")
    with a_helper(a_plan.a_plan(tmp_path / "root", late=b"no BPF.." * 2), namespace=namespace, script=script) as helper:
        assert helper.heard()[0] == "contained"
        verb, given = helper.heard()
        assert (verb, given["failed"]) == ("ready", {"seccomp": os.strerror(errno.EINVAL)})


# Its places


FOLDERS = """
import json, os
place = os.environ["OVERLAY_SCRATCH"]
assert place == os.environ["TMPDIR"]
print(json.dumps([place, os.listdir(place), os.listdir(os.path.dirname(place))]))
os.makedirs(place + "/a/b")
open(place.encode() + b"/a/b/\\xff", "w").close()
os.symlink(os.path.dirname(os.path.dirname(place)), place + "/a/link")
os.chmod(place + "/a/b", 0)
os.chmod(place, 0)
"""


def test_each_call_has_a_folder_of_its_own_that_is_gone_after_it(namespace: bool, tmp_path: Path) -> None:
    root = tmp_path / "root"
    beside = root / "beside"
    beside.mkdir(parents=True)
    with a_helper(a_plan.a_plan(root, capabilities=0), namespace=namespace) as helper:
        helper.until_ready()
        said = [json.loads(helper.run(python(FOLDERS))[0]) for _ in range(3)]
        expected = root if namespace else root / helper.mark
        assert said == [[f"{expected}/{number}", [], [str(number)]] for number in (1, 2, 3)]
    assert list(root.iterdir()) == [beside]


def test_scripts_have_theirs_also_where_their_process_was_there_before(namespace: bool, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(FOLDERS)
    with a_helper(a_plan.a_plan(tmp_path / "root"), namespace=namespace, script=script) as helper:
        helper.until_ready()
        said = [json.loads(helper.run([str(script)])[0]) for _ in range(3)]
    assert [(place.rpartition("/")[2], found, beside) for place, found, beside in said] == [
        (str(number), [], [str(number)]) for number in (1, 2, 3)
    ]


def test_what_a_program_puts_in_the_place_of_the_next_call_is_not_there(namespace: bool, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    sabotage = f"import os; os.symlink({str(tmp_path)!r}, os.path.dirname(os.environ['TMPDIR']) + '/2')"
    with a_helper(a_plan.a_plan(tmp_path / "root"), namespace=namespace) as helper:
        helper.until_ready()
        helper.run(python(sabotage))
        _, found, _ = json.loads(helper.run(python(FOLDERS))[0])
    assert (found, (tmp_path / "kept").read_text()) == ([], "kept")


def test_a_program_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    with a_helper(a_plan.a_plan(tmp_path), namespace=False) as helper:
        helper.until_ready()
        helper.start(["/no/such/program"], 2)
        assert helper.heard()[0] == "failed"
        assert list((tmp_path / helper.mark).iterdir()) == []


@pytest.mark.parametrize("victim", ["inside", "outside"])
def test_the_folder_on_the_disk_is_gone_when_a_process_of_the_helper_was_killed(tmp_path: Path, victim: str) -> None:
    with a_helper(a_plan.a_plan(tmp_path), namespace=False) as helper:
        helper.until_ready()
        reader, writer = os.pipe()
        helper.start(python("import signal; print(flush=True); signal.pause()"), writer)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        (inside,) = children(helper.process.pid)
        if victim == "inside":
            os.kill(inside, signal.SIGKILL)
        else:
            helper.process.terminate()
        helper.process.wait()
        assert list(tmp_path.iterdir()) == []


TRIES = 20
"""Of a program that the watch may end before it comes to what is asked of it."""

FILL = """
import os
try:
    with open(os.environ["OVERLAY_SCRATCH"] + "/file", "wb", buffering=0) as file:
        for _ in range(64):
            file.write(bytes(64 * 1024))
except OSError as error:
    print(error.errno)
"""


def test_a_namespace_holds_no_more_than_its_quota_and_none_of_it_stays(tmp_path: Path) -> None:
    with a_helper(a_plan.a_plan(tmp_path), namespace=True) as helper:
        if helper.heard()[0] != "contained":
            pytest.skip("this kernel gives no pid namespace")
        helper.heard()
        told = 0
        for _ in range(TRIES):
            said, (_, _, _, _, why) = helper.run(python(FILL))
            assert said == f"{errno.ENOSPC}\n" or (not said and "scratch" in why)  # it may be seen while it is full
            told += bool(said)
            if told == 2:
                break
        assert told == 2
        assert list(tmp_path.iterdir()) == []


SHARE = """
import os, sys
print(os.listdir("/dev/shm"))
open("/dev/shm/of-a-call", "w").close()
os.mkdir("/dev/shm/folder", 0)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this machine has no /dev/shm")
def test_shared_memory_of_a_namespace_is_its_own_and_empty_for_each_lone_call(tmp_path: Path) -> None:
    with a_helper(a_plan.a_plan(tmp_path), namespace=True) as helper:
        if helper.heard()[0] != "contained":
            pytest.skip("this kernel gives no pid namespace")
        helper.heard()
        for _ in range(2):
            assert helper.run(python(SHARE))[0] == "[]\n"
    assert not Path("/dev/shm/of-a-call").exists()


# Their limits


LIMIT = "import resource; print(resource.getrlimit(resource.RLIMIT_DATA))"


@pytest.mark.parametrize("forks", [False, True], ids=["spawn", "fork"])
def test_a_call_may_have_as_much_data_as_it_is_given(namespace: bool, tmp_path: Path, forks: bool) -> None:
    script = tmp_path / "run.py"
    script.write_text(LIMIT)
    unlimited = str(resource.getrlimit(resource.RLIMIT_DATA))
    given = [100 << 20, 0, 200 << 20, 300 << 20]
    with a_helper(a_plan.a_plan(tmp_path / "root"), namespace=namespace, script=script if forks else None) as helper:
        helper.until_ready()
        found = [helper.run([str(script)] if forks else python(LIMIT), data)[0] for data in given]
    assert found == [f"({data}, {data})\n" if data else f"{unlimited}\n" for data in given]


@pytest.mark.parametrize(
    ("command", "number"), [("/no/such/program", errno.ENOENT), ("/", errno.EACCES), ("no-such-program", errno.ENOENT)]
)
def test_a_program_of_limited_data_that_cannot_be_started_says_why(
    namespace: bool, tmp_path: Path, command: str, number: int
) -> None:
    with a_helper(a_plan.a_plan(tmp_path), namespace=namespace) as helper:
        helper.until_ready()
        helper.start([command], 2, data_bytes=100 << 20)
        assert helper.heard() == ["failed", [1, number, os.strerror(number)]]
        assert helper.run(python("print(1)"), data_bytes=100 << 20)[0] == "1\n"


MOST = 20
SWARM = f"""
import os, signal
for _ in range({MOST} + 5):
    if not os.fork():
        {{leaves}}
        signal.pause()
signal.pause()
"""
THREADS = f"""
import signal, threading
for _ in range({MOST} + 5):
    threading.Thread(target=signal.pause).start()
"""


CLONE = {"x86_64": 56, "aarch64": 220}
"""The number of clone by machine."""

BESIDE = f"""
import ctypes, signal
CLONE_PARENT = 0x8000
for _ in range({MOST} + 5):
    if not ctypes.CDLL(None).syscall({CLONE.get(platform.machine())}, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0):
        signal.pause()
signal.pause()
"""
NAMELESS = f"""
import ctypes, os, select, signal, sys
signal.alarm({int(PATIENCE_S)})
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
alive = select.poll()
for _ in range(3 * {MOST}):
    reader, writer = os.pipe()
    if not os.fork():
        os.setsid()
        if not os.fork():
            {{becomes}}
            signal.pause()
        os._exit(0)
    os.wait()
    os.close(writer)
    alive.register(reader, 0)
left = 3 * {MOST}
while left > {MOST}:
    for fd, _ in alive.poll():
        alive.unregister(fd)
        left -= 1
print("no more than are allowed")
"""
"""Each holds the only other end of a pipe, until it has ended."""

EXECUTES = "os.set_inheritable(writer, True); os.execve(sys.executable, {command!r}, {{}})"


WAITS_OR_RUNS = """
import sys
exec("".join(sys.argv[1:]) or "import signal; signal.pause()")
"""


@pytest.mark.parametrize(
    "code",
    [
        SWARM.format(leaves=""),
        SWARM.format(leaves="os.setsid()"),
        THREADS,
        pytest.param(BESIDE, marks=pytest.mark.skipif(platform.machine() not in CLONE, reason="its number is unknown")),
    ],
    ids=["group", "sessions", "threads", "beside"],
)
@pytest.mark.parametrize("forks", [False, True], ids=["spawn", "fork"])
def test_a_call_with_too_many_processes_ends_as_a_whole_and_no_other(
    namespace: bool, tmp_path: Path, code: str, forks: bool
) -> None:
    script = tmp_path / "run.py"
    script.write_text(WAITS_OR_RUNS)
    command = [str(script)] if forks else [*PYTHON, str(script)]
    plan = a_plan.a_plan(tmp_path / "root", processes=MOST)
    with a_helper(plan, namespace=namespace, script=script if forks else None) as helper:
        helper.until_ready()
        helper.start(command, 2)
        crowd = helper.start([*command, code], 2)
        number, status, _, _, why = helper.ended()
        assert (number, os.waitstatus_to_exitcode(status)) == (crowd, -signal.SIGKILL)
        assert why.startswith("too many processes: it had ")
        assert why.endswith(f"where {MOST} are allowed")
        (inside,) = children(helper.process.pid)
        assert len(children(inside)) == 1  # the other call


@pytest.mark.parametrize("forks", [False, True], ids=["spawn", "fork"])
def test_of_processes_that_hide_whose_they_are_no_more_live_than_one_call_may_have(
    namespace: bool, tmp_path: Path, forks: bool
) -> None:
    script = tmp_path / "run.py"
    script.write_text(WAITS_OR_RUNS)
    command = [str(script)] if forks else [*PYTHON, str(script)]
    executes = EXECUTES.format(command=python("import signal; signal.pause()"))
    code = NAMELESS.format(becomes="" if forks else executes)
    plan = a_plan.a_plan(tmp_path / "root", processes=MOST)
    with a_helper(plan, namespace=namespace, script=script if forks else None) as helper:
        helper.until_ready()
        helper.start(command, 2)
        said, (_, status, _, _, why) = helper.run([*command, code])
        assert (said, status, why) == ("no more than are allowed\n", 0, None)
        (inside,) = children(helper.process.pid)
        assert len(children(inside)) == 1  # the other call


def test_a_call_with_as_many_processes_as_it_may_have_goes_on(tmp_path: Path) -> None:
    code = f"""
import os, signal, time
for _ in range({MOST - 1}):
    if not os.fork():
        signal.pause()
time.sleep({3 * RARELY_S})
print("done")
"""
    with a_helper(a_plan.a_plan(tmp_path / "root", processes=MOST), namespace=False) as helper:
        helper.until_ready()
        said, (_, _, _, _, why) = helper.run(python(code))
    assert (said, why) == ("done\n", None)


# What they may have in scratch

QUOTA_KIB = 1024
FILLS = """
import os, signal
for number in range(%d):
    with open(os.environ["OVERLAY_SCRATCH"] + "/%%d" %% number, "wb", buffering=0) as file:
        file.write(os.urandom(64 * 1024))
"""


class Place(NamedTuple):
    """Whether the helper has a namespace, and whether scratch is memory of its own there, which takes one."""

    namespace: bool
    mounts: bool


def filling(kib: int, then: str = "") -> str:
    return FILLS % (kib // 64) + then


@pytest.fixture(
    params=[Place(True, True), Place(True, False), Place(False, False)],
    ids=["in memory", "on disk with a namespace", "on disk"],
)
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    if found.namespace:
        need_namespace()
    return found


@pytest.fixture(params=[False, True], ids=["spawn", "fork"])
def helper(request: pytest.FixtureRequest, place: Place, tmp_path: Path) -> Iterator[tuple[BareHelper, list[str]]]:
    """One whose calls may have a MiB, and the command to which the code of a program is added."""
    script = tmp_path / "run.py"
    script.write_text(WAITS_OR_RUNS)
    plan = a_plan.a_plan(tmp_path / "root", mounts=place.mounts)
    with a_helper(plan, namespace=place.namespace, script=script if request.param else None) as made:
        made.until_ready()
        yield made, [str(script)] if request.param else [*PYTHON, str(script)]
    assert list((tmp_path / "root").iterdir()) == []


def assert_too_full(why: str) -> None:
    assert why.startswith("too much in scratch: ")
    assert why.endswith(f" KiB, where {QUOTA_KIB} are allowed")


def test_where_it_is_not_memory_the_folders_are_on_the_disk_with_a_namespace_too(
    namespace: bool, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    with a_helper(a_plan.a_plan(root, mounts=False), namespace=namespace) as helper:
        helper.until_ready()
        place, found, beside = json.loads(helper.run(python(FOLDERS))[0])
        assert (place, found, beside) == (f"{root}/{helper.mark}/1", [], ["1"])
        assert [path.name for path in root.iterdir()] == [helper.mark]
    assert list(root.iterdir()) == []


def test_a_call_that_runs_on_with_too_much_is_ended_and_no_other(helper: tuple[BareHelper, list[str]]) -> None:
    made, command = helper
    made.start(command, 2)
    full = made.start([*command, filling(2 * QUOTA_KIB - 128, "signal.pause()")], 2)
    number, status, _, _, why = made.ended()
    assert (number, os.waitstatus_to_exitcode(status)) == (full, -signal.SIGKILL)
    assert_too_full(why)
    (inside,) = children(made.process.pid)
    assert len(children(inside)) == 1  # the other call


def test_a_call_that_has_ended_with_too_much_is_told_so(helper: tuple[BareHelper, list[str]]) -> None:
    made, command = helper
    at_once = f"""
import os
fd = os.open(os.environ["OVERLAY_SCRATCH"] + "/file", os.O_WRONLY | os.O_CREAT)
os.posix_fallocate(fd, 0, {(2 * QUOTA_KIB - 128) << 10})
os._exit(0)
"""
    for _ in range(TRIES):  # one that was looked at in between is ended, and so told as well
        _, (_, status, _, _, why) = made.run([*command, at_once])
        assert_too_full(why)
        if status == 0:
            break
    assert status == 0


def test_a_call_that_has_what_it_may_goes_on_beside_one_that_has_too_much(
    helper: tuple[BareHelper, list[str]],
) -> None:
    made, command = helper
    patient = f"import time; time.sleep({4 * RARELY_S}); print('done')"
    said, (_, status, _, _, why) = made.run([*command, filling(QUOTA_KIB - 64, patient)])
    assert (said, status, why) == ("done\n", 0, None)
    made.run([*command, filling(2 * QUOTA_KIB - 128)])
    said, (_, status, _, _, why) = made.run([*command, filling(QUOTA_KIB - 64, "print('done')")])
    assert (said, status, why) == ("done\n", 0, None)


def test_what_a_link_leads_to_is_not_the_calls(helper: tuple[BareHelper, list[str]]) -> None:
    made, command = helper
    code = f"""
import os, time
os.symlink("/", os.environ["OVERLAY_SCRATCH"] + "/everything")
time.sleep({3 * RARELY_S})
print("done")
"""
    said, (_, status, _, _, why) = made.run([*command, code])
    assert (said, status, why) == ("done\n", 0, None)


EMPTY = """
import os, signal
for number in range(1_000_000):
    open(os.environ["OVERLAY_SCRATCH"] + "/%d" % number, "w").close()
"""


def test_a_million_empty_files_are_too_many(helper: tuple[BareHelper, list[str]]) -> None:
    made, command = helper
    _, (_, status, _, _, why) = made.run([*command, EMPTY])
    assert_too_full(why)
    assert status != 0


def test_a_call_may_fill_the_folder_of_another_which_is_ended(place: Place, tmp_path: Path) -> None:
    """They are not shielded from each other; what they have together is bounded all the same."""
    with a_helper(a_plan.a_plan(tmp_path / "root", mounts=place.mounts), namespace=place.namespace) as made:
        made.until_ready()
        victim = made.start(python("import signal; signal.pause()"), 2)
        code = f"import os; os.environ['OVERLAY_SCRATCH'] = os.environ['OVERLAY_SCRATCH'][:-1] + '{victim}'"
        _, end = made.run(python(code + filling(2 * QUOTA_KIB - 128)))
        ends = {end[0]: end} if end[0] == victim else {end[0]: end, victim: made.ended()}
        assert_too_full(ends[victim][-1])


def test_what_is_put_beside_the_folders_of_calls_goes(place: Place, tmp_path: Path) -> None:
    code = """
import os, time
beside = os.path.dirname(os.environ["OVERLAY_SCRATCH"]) + "/beside"
os.mkdir(beside)
open(beside + "/file", "wb").write(bytes(100_000))
while os.path.exists(beside):
    time.sleep(0.01)
print("gone")
"""
    with a_helper(a_plan.a_plan(tmp_path / "root", mounts=place.mounts), namespace=place.namespace) as made:
        made.until_ready()
        assert made.run(python(code))[0] == "gone\n"
