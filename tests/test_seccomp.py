"""The filter of system calls: what it decides, by an interpreter of classic BPF."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from runners import bpf, seccomp
from runners.seccomp import Rules
from runners.syscalls import MACHINES, NEWEST
from tests.bpf_interpreter import HIGHEST, Run, call_data, checked, run
from tests.seccomp_tables import (
    ALL_RULES,
    ANY,
    CLEAR,
    CLOEXEC,
    DGRAM,
    EVERY,
    EVERYWHERE,
    FASTOPEN,
    INET,
    NO_EXEC,
    NO_NETWORK,
    NONE,
    ONLY_CLEAR,
    RAW,
    SEQPACKET,
    SERVE,
    SOCKETS,
    SOMETIMES,
    STREAM,
    UNIX,
    UPPER,
    WATCHING,
    names,
)

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
I386, ARM = 0x40000003, 0x40000028
"""AUDIT_ARCH of what x86-64 and aarch64 run beside their own (<linux/audit.h>)."""


def verdict(machine: str, rules: Rules, name: str, *arguments: int) -> int:
    """The error of a call, 0 where it is allowed."""
    program = checked(seccomp.compile(rules, machine))
    return error_of(run(program, call_data(machine, MACHINES[machine].numbers[name], arguments)))


def error_of(ended: Run) -> int:
    if ended.verdict == ALLOW:
        return 0
    assert ended.verdict & 0xFFFF0000 == ERRNO
    return ended.verdict & 0xFFFF


@pytest.fixture(params=seccomp.machines())
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- what is decided by the number alone ---


@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_exactly_the_named_calls_are_refused_of_all_that_there_are(machine: str, rules: Rules) -> None:
    expected = names(machine, EVERYWHERE)
    expected |= set() if rules.exec else names(machine, NO_EXEC)
    expected |= names(machine, CLEAR) if rules.clear else set()
    if not rules.network:
        expected |= names(machine, WATCHING)
        expected |= {"connect"} if rules.serve else names(machine, NO_NETWORK)
    elif rules.network is not True and not rules.serve:
        expected |= {"listen"}
    program = checked(seccomp.compile(rules, machine))
    decided = MACHINES[machine].numbers.keys() - names(machine, SOMETIMES)
    for filling in (0, 1, HIGHEST):
        ends = {
            name: run(program, call_data(machine, MACHINES[machine].numbers[name], [filling] * 6)) for name in decided
        }
        assert {name for name, ended in ends.items() if error_of(ended) == errno.EPERM} == expected
        assert {error_of(ended) for ended in ends.values()} == {0, errno.EPERM}


def test_every_refused_name_is_a_call_of_some_machine() -> None:
    known = {name for machine in MACHINES.values() for name in machine.numbers}
    assert {
        name for text in (EVERYWHERE, CLEAR, NO_EXEC, NO_NETWORK, WATCHING, SOMETIMES) for name in text.split()
    } <= known


@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_every_call_of_another_abi_is_refused(rules: Rules) -> None:
    for machine, foreign in (("x86_64", I386), ("aarch64", ARM), ("x86_64", MACHINES["aarch64"].audit)):
        program = checked(seccomp.compile(rules, machine))
        ends = {run(program, call_data(machine, number, audit=foreign)).verdict for number in range(NEWEST + 2)}
        assert ends == {ERRNO | errno.EPERM}
    x86 = checked(seccomp.compile(rules, "x86_64"))
    assert {run(x86, call_data("x86_64", 1 << 30 | number)).verdict for number in range(600)} == {ERRNO | errno.EPERM}


def test_what_is_newer_than_the_tables_does_not_exist(machine: str) -> None:
    program = checked(seccomp.compile(Rules(network=True, exec=True), machine))
    numbers = [*range(NEWEST + 1, 1100), 0x3FFFFFFF]
    assert {run(program, call_data(machine, number)).verdict for number in numbers} == {ERRNO | errno.ENOSYS}
    assert run(program, call_data(machine, NEWEST)).verdict == ALLOW


def test_gaps_in_the_numbers_stay_open(machine: str) -> None:
    """On x86-64 there are calls in them that only the kernel's own trampolines make (uretprobe)."""
    program = checked(seccomp.compile(Rules(), machine))
    gaps = set(range(NEWEST)) - set(MACHINES[machine].numbers.values())
    assert gaps
    assert {run(program, call_data(machine, number)).verdict for number in gaps} == {ALLOW}


@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_an_allowed_call_is_decided_in_a_few_steps_without_its_arguments(machine: str, rules: Rules) -> None:
    """Then the kernel need not run the program for it (seccomp_cache_prepare in kernel/seccomp.c)."""
    program = checked(seccomp.compile(rules, machine))
    for name in MACHINES[machine].numbers.keys() - names(machine, SOMETIMES):
        ended = run(program, call_data(machine, MACHINES[machine].numbers[name]))
        assert ended.loaded == {bpf.ARCH, bpf.NUMBER}, name
        assert ended.steps <= 12, name


def test_the_late_filter_refuses_to_execute_and_nothing_else(machine: str) -> None:
    program = checked(seccomp.late(machine))
    ends = {name: run(program, call_data(machine, number)) for name, number in MACHINES[machine].numbers.items()}
    assert {name for name, ended in ends.items() if error_of(ended)} == {"execve", "execveat"}
    assert run(program, call_data(machine, 11, audit=I386)).verdict == ERRNO | errno.EPERM


TO_OTHERS = [
    ("prlimit64", (0, 7, 1), True),
    ("prlimit64", (42, 7, 0), True),
    ("prlimit64", (42, 7, 1 << 40), False),
    ("setpriority", (0, 0, 5), True),
    ("setpriority", (0, 42, 5), False),
    ("setpriority", (2, 0, 5), False),
    ("ioprio_set", (1, 0, 0), True),
    ("ioprio_set", (1, 42, 0), False),
    ("ioprio_set", (3, 0, 0), False),
    ("sched_setaffinity", (0, 8, 1), True),
    ("sched_setaffinity", (42, 8, 1), False),
    ("sched_setscheduler", (42, 0, 1), False),
    ("sched_setparam", (42, 1), False),
    ("sched_setattr", (42, 1, 0), False),
    ("migrate_pages", (42, 8, 1, 1), False),
    ("move_pages", (42, 1, 1), False),
    ("process_madvise", (3, 1, 1, 1, 0), False),
    ("process_mrelease", (3, 0), False),
    *((name, (1, 1, 0), False) for name in ("shmget", "semget", "msgget", "shmctl", "semop", "msgsnd", "mq_open")),
    ("kill", (42, 9), True),
]


@pytest.mark.parametrize(("name", "arguments", "is_allowed"), TO_OTHERS, ids=str)
def test_the_filter_for_shared_numbers_refuses_what_is_done_to_other_processes(
    machine: str, name: str, arguments: tuple[int, ...], is_allowed: bool
) -> None:
    program = checked(seccomp.others(machine))
    ended = run(program, call_data(machine, MACHINES[machine].numbers[name], arguments))
    assert error_of(ended) == (0 if is_allowed else errno.EPERM)


# --- what is decided by its arguments ---


@pytest.mark.parametrize(("asked", "given_to"), SOCKETS, ids=str)
def test_a_socket_is_made_only_where_its_family_type_and_protocol_are_allowed(
    machine: str, asked: tuple[int, ...], given_to: tuple[Rules, ...]
) -> None:
    for rules in EVERY:
        expected = 0 if rules in given_to else errno.EPERM
        assert verdict(machine, rules, "socket", *asked) == expected, rules
        in_upper_halves = [argument | UPPER for argument in asked]
        assert verdict(machine, rules, "socket", *in_upper_halves) == expected, "the kernel reads an int"


@pytest.mark.parametrize("rules", EVERY, ids=str)
def test_a_pair_of_sockets_is_local_and_without_network_connected_for_good(machine: str, rules: Rules) -> None:
    def pair(family: int, kind: int) -> int:
        return verdict(machine, rules, "socketpair", family, kind | CLOEXEC)

    assert pair(UNIX, STREAM) == pair(UNIX, SEQPACKET) == 0
    assert pair(UNIX, DGRAM) == (0 if rules.network else errno.EPERM)
    assert pair(UNIX, RAW) == pair(INET, STREAM) == pair(30, STREAM) == errno.EPERM


@pytest.mark.parametrize("rules", [NONE, SERVE, ONLY_CLEAR], ids=str)
def test_without_network_nothing_is_sent_to_an_address(machine: str, rules: Rules) -> None:
    assert verdict(machine, rules, "sendto", 3, 4096, 10, 0, 0, 0) == 0
    for address in (1, 0x7FFF_0000_1000, UPPER, 0xFFFF_FFFF_0000_0000):
        assert verdict(machine, rules, "sendto", 3, 4096, 10, 0, address, 16) == errno.EPERM
    assert verdict(machine, ANY, "sendto", 3, 4096, 10, 0, 1 << 40, 16) == 0


@pytest.mark.parametrize("rules", EVERY, ids=str)
def test_only_with_any_network_a_send_may_connect(machine: str, rules: Rules) -> None:
    expected = 0 if rules is ANY else errno.EPERM
    for flags in (FASTOPEN, FASTOPEN | 0x4000, FASTOPEN | UPPER):
        assert verdict(machine, rules, "sendto", 3, 4096, 10, flags, 0, 0) == expected
        assert verdict(machine, rules, "sendmsg", 3, 4096, flags) == expected
        assert verdict(machine, rules, "sendmmsg", 3, 4096, 1, flags) == expected
    for name in ("sendto", "sendmsg", "sendmmsg"):
        assert verdict(machine, rules, name, 3, 4096, 0, 0) == 0


def test_an_empty_list_of_ports_is_no_network(machine: str) -> None:
    assert seccomp.compile(Rules(network=()), machine) == seccomp.compile(Rules(), machine)


def test_namespaces_are_refused_and_processes_and_threads_are_not(machine: str) -> None:
    new = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
    for flag in new:
        assert verdict(machine, ANY, "clone", flag | 17) == errno.EPERM
        assert verdict(machine, ANY, "unshare", flag) == errno.EPERM
    assert verdict(machine, ANY, "unshare", 0x80) == errno.EPERM, "a namespace of times"
    assert verdict(machine, ANY, "unshare", 0x400) == 0, "its own table of files"
    assert verdict(machine, ANY, "clone", 17) == 0, "fork"
    assert verdict(machine, ANY, "clone", 0x4111) == 0, "vfork"
    assert verdict(machine, ANY, "clone", 0x3D0F00) == 0, "a thread"
    assert verdict(machine, ANY, "clone3", 4096, 88) == errno.ENOSYS, "so that the C library falls back to clone"


def test_a_personality_is_asked_for_or_the_usual_one(machine: str) -> None:
    assert verdict(machine, ANY, "personality", 0xFFFFFFFF) == verdict(machine, ANY, "personality", 0) == 0
    for other in (0x8, 0x40000, 0x0400000, 0x100000):
        assert verdict(machine, ANY, "personality", other) == errno.EPERM


@pytest.mark.parametrize("rules", EVERY, ids=str)
def test_terminals_are_not_typed_on_and_in_clear_no_attributes_set(machine: str, rules: Rules) -> None:
    tiocsti, tioclinux, tcgets, getflags = 0x5412, 0x541C, 0x5401, 0x80086601
    setflags, fssetxattr = 0x40086602, 0x401C5820
    for command in (tiocsti, tioclinux, tiocsti | UPPER, tioclinux | UPPER):
        assert verdict(machine, rules, "ioctl", 0, command, 4096) == errno.EPERM
    for command in (setflags, fssetxattr, fssetxattr | UPPER):
        assert verdict(machine, rules, "ioctl", 0, command, 4096) == (errno.EPERM if rules.clear else 0)
    assert verdict(machine, rules, "ioctl", 0, tcgets) == verdict(machine, rules, "ioctl", 0, getflags) == 0


@pytest.mark.parametrize("rules", EVERY, ids=str)
def test_in_clear_a_folder_stays_open_to_its_owner(machine: str, rules: Rules) -> None:
    """Who may not change modes could neither empty one that is not."""
    shut = errno.EPERM if rules.clear else 0
    for mode, expected in ((0o777, 0), (0o700, 0), (0o1770, 0), (0o500, shut), (0o300, shut), (0o077, shut), (0, shut)):
        assert verdict(machine, rules, "mkdirat", 3, 4096, mode) == expected
        assert machine != "x86_64" or verdict(machine, rules, "mkdir", 4096, mode) == expected
    for mask, expected in ((0, 0), (0o022, 0), (0o077, 0), (0o100, shut), (0o400, shut), (0o777, shut)):
        assert verdict(machine, rules, "umask", mask) == expected


# --- machines ---


def test_a_machine_without_a_table_is_named_and_gets_no_filter() -> None:
    assert "riscv64" in (seccomp.lacks("riscv64") or "")
    assert [seccomp.lacks(machine) for machine in seccomp.machines()] == [None, None]
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.compile(Rules(), "riscv64")
    with pytest.raises(ValueError, match="aarch64_be"):
        seccomp.late("aarch64_be")


HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(not HEADER.exists(), reason="no kernel headers of x86-64 here")
def test_the_numbers_are_those_of_the_kernels_header() -> None:
    found = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)\n", HEADER.read_text())}
    ours = MACHINES["x86_64"].numbers
    assert {
        name: ours.get(name) for name, number in found.items() if number <= NEWEST and number not in {335, 336}
    } == {name: number for name, number in found.items() if number <= NEWEST and number not in {335, 336}}


def test_each_number_has_one_name_and_landmarks_stand_where_they_should(machine: str) -> None:
    numbers = MACHINES[machine].numbers
    assert len(set(numbers.values())) == len(numbers)
    landmarks = {"io_setup": (206, 0), "read": (0, 63), "clone": (56, 220), "socket": (41, 198), "wait4": (61, 260)}
    landmarks |= {
        "seccomp": (317, 277),
        "kexec_file_load": (320, 294),
        "clone3": (435, 435),
        "file_setattr": (469, 469),
    }
    column = ("x86_64", "aarch64").index(machine)
    assert {name: numbers[name] for name in landmarks} == {name: both[column] for name, both in landmarks.items()}
