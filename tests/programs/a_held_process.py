"""A process that takes a part of a plan on itself, and then looks what it still can.

python -m tests.programs.a_held_process CHECK [USER_ID]
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from runners import sandbox
from tests.programs import a_plan

if TYPE_CHECKING:
    from collections.abc import Callable

CAP_DAC_OVERRIDE = 1
SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")
LIBRARIES = [path for path in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache") if Path(path).exists()]


def status(text: str | None = None) -> dict[str, str]:
    lines = (text or Path("/proc/self/status").read_text()).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def error_of(function: Callable[[], object]) -> int | None:
    """The errno of what fails; None where it does not."""
    try:
        function()
    except OSError as error:
        return error.errno
    return None


def without_capabilities() -> None:
    sandbox.drop_capabilities(0)
    now = status()
    assert [int(now[name], 16) for name in SETS] == [0] * len(SETS)
    executed = status(subprocess.run(["cat", "/proc/self/status"], capture_output=True, check=True, text=True).stdout)
    assert int(executed["CapEff"], 16) == int(executed["CapPrm"], 16) == 0
    assert executed["NoNewPrivs"] == "1"


def with_the_capabilities_that_stay_and_no_other() -> None:
    had = int(status()["CapEff"], 16)
    sandbox.drop_capabilities(1 << CAP_DAC_OVERRIDE)
    now = status()
    assert int(now["CapEff"], 16) == int(now["CapPrm"], 16) == had & 1 << CAP_DAC_OVERRIDE
    if had >> 8 & 1:  # CAP_SETPCAP
        assert int(now["CapBnd"], 16) == 1 << CAP_DAC_OVERRIDE


def with_limits_that_nobody_raises() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (100, 100))
    sandbox.drop_capabilities(0)
    sandbox.limit([[resource.RLIMIT_NOFILE, 20], [resource.RLIMIT_CORE, 1000]])
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 20)
    assert resource.getrlimit(resource.RLIMIT_CORE) == (100, 100)
    assert error_of(lambda: [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]) == errno.EMFILE
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (21, 21))
        raise AssertionError


def with_limits_as_far_as_there_are_such() -> None:
    taken, failed = sandbox.take(a_plan.a_plan(limits=[[99, 1], [resource.RLIMIT_NOFILE, 20]]), [], in_namespace=True)
    assert (taken, failed) == ([], {"limits": "resource 99"})
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 20)


def with_the_files_of_its_rules() -> None:
    given, other = (Path(tempfile.mkdtemp()) for _ in range(2))
    for folder in (given, other):
        (folder / "file").write_text("text")
    rules = a_plan.landlock((given, a_plan.READ_FILE | a_plan.READ_DIR), (given / "file", a_plan.ALL))
    rules["paths"] += [["/no/such/place", a_plan.ALL], [str(given / "file" / "below"), a_plan.ALL]]
    sandbox.restrict(rules, [])
    assert (given / "file").read_text() == "text"
    (given / "file").write_text("more")
    assert error_of(lambda: (given / "another").write_text("text")) == errno.EACCES
    assert error_of((other / "file").read_text) == error_of(lambda: list(other.iterdir())) == errno.EACCES
    assert error_of((other / "file").unlink) == errno.EACCES


def with_the_files_of_its_rules_though_links_took_their_places() -> None:
    """By a link in a resolved path, at its end and on its way, and by one to itself."""
    given, other = (Path(tempfile.mkdtemp()) for _ in range(2))
    (other / "below").mkdir()
    for folder in (given, other, other / "below"):
        (folder / "file").write_text("text")
    (given / "link").symlink_to(other)
    (given / "loop").symlink_to("loop")
    rules = a_plan.landlock(*((given / name, a_plan.ALL) for name in ("file", "link", "link/below", "loop")))
    sandbox.restrict(rules, [])
    assert (given / "file").read_text() == "text"
    for file in (other / "file", other / "below" / "file", given / "link" / "file"):
        assert error_of(file.read_text) == errno.EACCES, file


def with_the_same_files_where_the_kernel_opens_nothing_without_links() -> None:
    sandbox.take_filter(a_plan.refusing(sandbox.OPENAT2))
    with_the_files_of_its_rules_though_links_took_their_places()


def with_its_own_places() -> None:
    place, other = (Path(tempfile.mkdtemp()) for _ in range(2))
    taken, failed = sandbox.take(a_plan.a_plan(landlock=a_plan.landlock()), [str(place)], in_namespace=True)
    assert (taken, failed) == (["landlock"], {})
    (place / "folder").mkdir()
    (place / "folder" / "file").write_text("text")
    assert error_of((other / "folder").mkdir) == errno.EACCES


def with_the_programs_of_its_rules() -> None:
    true, false = (Path(Path(f"/bin/{name}").resolve()) for name in ("true", "false"))
    readable = [(Path(path).resolve(), a_plan.READ_FILE | a_plan.READ_DIR) for path in LIBRARIES]
    loaders = [(path.resolve(), a_plan.EXECUTE) for lib in ("/lib64", "/lib") for path in Path(lib).glob("ld-*")]
    sandbox.restrict(a_plan.landlock(*readable, *loaders, (true, a_plan.EXECUTE), (os.devnull, a_plan.ALL)), [])
    assert subprocess.run([true], check=False).returncode == 0
    if true != false:  # they may be one program
        assert error_of(lambda: subprocess.run([false], check=False)) == errno.EACCES


def with_the_ports_of_its_rules() -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    rules = a_plan.landlock(net=a_plan.CONNECT_TCP, ports=[[ports[0], a_plan.CONNECT_TCP]])
    sandbox.restrict(rules, [])
    for port, expected in zip(ports, (None, errno.EACCES), strict=True):
        with socket.socket() as client:
            assert error_of(lambda at=("127.0.0.1", port), to=client: to.connect(at)) == expected  # type: ignore[misc]


def without_signals_to_others() -> None:
    stranger = os.getppid()
    sandbox.restrict(a_plan.landlock(scoped=a_plan.SCOPES), [])
    assert error_of(lambda: os.kill(stranger, 0)) == errno.EPERM
    child = os.fork()
    if not child:
        signal.pause()
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def without_a_system_call() -> None:
    number = a_plan.GETPPID[platform.machine()]
    taken, failed = sandbox.take(a_plan.a_plan(seccomp=a_plan.refusing(number)), [], in_namespace=True)
    assert (taken, failed) == (["seccomp"], {})
    libc = ctypes.CDLL(None, use_errno=True)
    assert (libc.syscall(number), ctypes.get_errno()) == (-1, errno.EPERM)
    assert os.getpid() > 0


def without_calls_on_others_where_they_have_numbers() -> None:
    number = a_plan.GETPPID[platform.machine()]
    plan = a_plan.a_plan(seccomp=a_plan.refusing(1 << 20), others=a_plan.refusing(number))
    libc = ctypes.CDLL(None, use_errno=True)
    sandbox.take(plan, [], in_namespace=True)
    assert libc.syscall(number) == os.getppid()
    sandbox.take(plan, [], in_namespace=False)
    assert (libc.syscall(number), ctypes.get_errno()) == (-1, errno.EPERM)


def as_far_as_the_kernel_takes_it() -> None:
    taken, failed = sandbox.take(a_plan.a_plan(capabilities=0, seccomp=b"no BPF at all..."), [], in_namespace=True)
    assert (taken, failed) == (["capabilities"], {"seccomp": os.strerror(errno.EINVAL)})


def as_before_where_nothing_is_asked_for() -> None:
    before = status()
    assert sandbox.take(a_plan.a_plan(), [], in_namespace=True) == ([], {})
    after = status()
    names = ("NoNewPrivs", "Seccomp", "CapEff", "CapBnd")
    assert [after[name] for name in names] == [before[name] for name in names]


CHECKS = {
    check.__name__: check
    for check in (
        without_capabilities,
        with_the_capabilities_that_stay_and_no_other,
        with_limits_that_nobody_raises,
        with_limits_as_far_as_there_are_such,
        with_the_files_of_its_rules,
        with_the_files_of_its_rules_though_links_took_their_places,
        with_the_same_files_where_the_kernel_opens_nothing_without_links,
        with_its_own_places,
        with_the_programs_of_its_rules,
        with_the_ports_of_its_rules,
        without_signals_to_others,
        without_a_system_call,
        without_calls_on_others_where_they_have_numbers,
        as_far_as_the_kernel_takes_it,
        as_before_where_nothing_is_asked_for,
    )
}


def run(check: Callable[[], None]) -> NoReturn:
    try:
        check()
    except BaseException:  # noqa: BLE001  # it is said, and this is a forked child
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for uid in map(int, sys.argv[2:]):
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    with tempfile.TemporaryDirectory(prefix="held-", dir=Path(tempfile.gettempdir()).resolve()) as folder:
        pid = os.fork()  # who removes the folder is held by nothing
        if not pid:
            tempfile.tempdir = folder
            run(CHECKS[sys.argv[1]])
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
