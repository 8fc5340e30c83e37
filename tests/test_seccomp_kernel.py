"""What the kernel makes of the filter: children under it make the calls."""

from __future__ import annotations

import ctypes
import errno
import json
import platform
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from runners import seccomp
from runners.seccomp import Rules
from runners.syscalls import MACHINES, NEWEST
from tests.seccomp_tables import (
    ANY,
    CLEAR,
    DGRAM,
    EVERYWHERE,
    HTTPS,
    INET,
    NETLINK,
    NO_EXEC,
    NO_NETWORK,
    NONE,
    SERVE,
    SOCKETS,
    STREAM,
    UNIX,
    WATCHING,
    names,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = platform.machine()


def kernel_filters() -> bool:
    """PR_GET_SECCOMP fails where the kernel was built without."""
    return int(ctypes.CDLL(None).prctl(21, 0, 0, 0, 0)) >= 0


held = pytest.mark.skipif(
    HERE not in seccomp.machines() or sys.maxsize < 2**32 or not kernel_filters(),
    reason="no filter for this machine, interpreter or kernel",
)

CHILD = """
import ctypes, json, sys
filters, calls, code = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
for text in filters:
    code_bytes = bytes.fromhex(text)
    program = Program(len(code_bytes) // 8, code_bytes)
    assert libc.prctl(22, 2, ctypes.byref(program)) == 0, "PR_SET_SECCOMP"

def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return ctypes.get_errno() if result == -1 else 0

print(json.dumps([call(*each) for each in calls]))
exec(code)
"""


def in_child(
    *filters: bytes, calls: Iterable[tuple[int, ...]] = (), code: str = ""
) -> subprocess.CompletedProcess[str]:
    told = json.dumps([[each.hex() for each in filters], list(calls), code])
    return subprocess.run(
        [sys.executable, "-I", "-c", CHILD], input=told, capture_output=True, text=True, timeout=60, check=False
    )


def errors_of(rules: Rules, calls: list[tuple[int, ...]]) -> list[int]:
    """What the kernel answers to each call in a process under the filter."""
    done = in_child(seccomp.compile(rules), calls=calls)
    assert done.returncode == 0, done.stderr
    errors: list[int] = json.loads(done.stdout)
    return errors


@held
def test_the_kernel_refuses_what_the_filter_names() -> None:
    """All arguments are -1, so that no call would do any harm if the filter let it pass."""
    numbers = MACHINES[HERE].numbers
    refused = sorted(names(HERE, EVERYWHERE, CLEAR, NO_EXEC, NO_NETWORK, WATCHING))
    errors = errors_of(Rules(clear=True), [(numbers[name], *[-1] * 6) for name in refused])
    assert {name: error for name, error in zip(refused, errors, strict=True) if error != errno.EPERM} == {}


@held
@pytest.mark.parametrize("rules", [NONE, HTTPS, ANY, SERVE], ids=str)
def test_the_kernel_makes_the_sockets_that_the_filter_leaves(rules: Rules) -> None:
    asked = [arguments for arguments, _ in SOCKETS]
    errors = errors_of(rules, [(MACHINES[HERE].numbers["socket"], *arguments) for arguments in asked])
    made = {arguments for arguments, given_to in SOCKETS if rules in given_to}
    results = dict(zip(asked, errors, strict=True))
    assert {arguments for arguments in asked if results[arguments] == errno.EPERM} == set(asked) - made
    always = {(INET, STREAM, 0), (UNIX, STREAM, 0), (NETLINK, DGRAM, 0)}
    assert {results[arguments] for arguments in made & always} <= {0}


@held
def test_the_kernel_makes_no_namespace_and_knows_no_clone3() -> None:
    numbers = MACHINES[HERE].numbers
    new_user, signal_child = 0x10000000, 17
    calls = [(numbers["unshare"], new_user), (numbers["clone"], new_user | signal_child, 0, 0, 0, 0)]
    calls += [(numbers["clone3"], 0, 0), (NEWEST + 1, 0), (numbers["unshare"], 0)]
    assert errors_of(ANY, calls) == [errno.EPERM, errno.EPERM, errno.ENOSYS, errno.ENOSYS, 0]


ORDINARY = """
import asyncio, multiprocessing, os, subprocess, sys, tempfile, threading
async def both():
    process = await asyncio.create_subprocess_exec("true")
    return await process.wait()
assert asyncio.run(both()) == 0
assert subprocess.run([sys.executable, "-I", "-c", "print(6 * 7)"], capture_output=True).stdout == b"42\\n"
thread = threading.Thread(target=print, args=("a thread",)); thread.start(); thread.join()
ours, theirs = multiprocessing.Pipe()
child = os.fork()
if not child:
    theirs.send("from a fork"); os._exit(0)
print(ours.recv()); os.waitpid(child, 0)
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x"); file.flush(); os.fsync(file.fileno())
"""


@held
def test_programs_threads_pipes_and_loops_work_under_the_strictest_filter() -> None:
    done = in_child(seccomp.compile(Rules(clear=True)), code=ORDINARY)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["[]", "a thread", "from a fork"]), done.stderr


SERVER = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.sendall(connection.recv(100).upper())
try:
    socket.create_connection(("127.0.0.1", 9))
except PermissionError as error:
    print(error.errno)
"""


@held
def test_a_server_answers_and_connects_nowhere() -> None:
    told = json.dumps([[seccomp.compile(SERVE).hex()], [], SERVER])
    with subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(told)
        child.stdin.close()
        assert child.stdout.readline() == "[]\n"
        with socket.create_connection(("127.0.0.1", int(child.stdout.readline()))) as connection:
            connection.sendall(b"hello")
            assert connection.recv(100) == b"HELLO"
        assert child.stdout.read() == f"{errno.EPERM}\n"


EXECUTE = """
import os, subprocess
try:
    subprocess.run(["true"])
except PermissionError:
    print("refused")
if not os.fork():
    os._exit(7)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@held
def test_after_the_late_filter_a_process_forks_and_executes_nothing() -> None:
    done = in_child(seccomp.compile(Rules(exec=True)), seccomp.late(), code=EXECUTE)
    assert done.stdout.splitlines() == ["[]", "refused", "7"], done.stderr


INT80_GETPID = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000" "cd80" "c3"))  # mov eax, 20; int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
"""


@held
@pytest.mark.skipif(HERE != "x86_64", reason="only x86-64 can make calls by another ABI in the same program")
def test_the_kernel_refuses_calls_by_another_abi() -> None:
    x32_getpid = (1 << 30) + MACHINES["x86_64"].numbers["getpid"]
    assert errors_of(ANY, [(x32_getpid,)]) == [errno.EPERM]
    unheld = in_child(code=INT80_GETPID)
    if unheld.returncode:
        pytest.skip("this kernel has no calls of i386")
    assert int(unheld.stdout.splitlines()[-1]) > 0
    assert in_child(seccomp.compile(ANY), code=INT80_GETPID).stdout.splitlines()[-1] == str(-errno.EPERM)
