"""The table of attempts to get out, and of what has to work though everything is held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bus.model import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

Right = Literal["read", "write", "network", "exec", "processes", "system", "limits"]

Unheld = Literal["everybody", "root", "nobody"]
"""Who gets through where nothing is held: an ordinary user is refused much by modes, and everybody by a namespace."""

WRITING = (Phase.OPEN, Phase.ALIGN, Phase.ASCEND, Phase.SEAL)
NETWORKING = (Phase.OPEN, Phase.ALIGN, Phase.ASCEND)
SILENT = (Phase.CLEAR, Phase.SEAL)
EXTREMES = (Phase.ASCEND, Phase.CLEAR)
"""The most rights and the fewest: for what no phase allows, or each."""

NOT_EXECUTING = (Phase.OPEN, Phase.CLEAR, Phase.SEAL)

NOTHING = "nothing"
"""Instead of an error: it was let, and found nothing."""

FILE = frozenset({"EACCES"})
"""Landlock's word (landlock(7)); so is that of modes."""

CALL = frozenset({"EPERM"})
"""The word that the filter of system calls gives."""

LINK = frozenset({"EACCES", "EXDEV"})
"""What would change a file's rights is told as another disk (landlock(7)), which it may be as well."""

HIDDEN = frozenset({"EPERM", "EACCES", "ESRCH", "ENOENT"})
"""Of a process: not there, where there is a namespace; else refused."""


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """One way out. `deed` is its function in `programs`, as `files.read_shadow`.

    `forbidden` and `allowed` are the phases that it is made in. `refused` has the errors with which it may fail, and
    `NOTHING`. `right` is what stands in the record as enforced. `rights` go into the manifest; `{outside}` and such
    are facts. `needs` is the fact without which the machine has nothing to aim at. `code` is that of the call, where
    it does not survive its attempt.
    """

    tries: str
    deed: str
    right: Right
    refused: frozenset[str] = frozenset()
    forbidden: tuple[Phase, ...] = ()
    allowed: tuple[Phase, ...] = ()
    unheld: Unheld = "everybody"
    rights: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    variant: str = ""
    worker: bool = False
    code: str = "OK"

    @property
    def name(self) -> str:
        """As an overlay may be called."""
        return "-".join(filter(None, (self.deed.partition(".")[2].replace("_", "-"), self.variant)))


def _kind(module: str, right: Right, refused: frozenset[str], forbidden: tuple[Phase, ...], **given: Any) -> Any:
    """What attempts of one kind have in common, as a function that makes one."""
    common = {"right": right, "refused": refused, "forbidden": forbidden} | given

    def attempt(tries: str, deed: str, **own: Any) -> Attempt:
        return Attempt(tries, f"{module}.{deed}", **(common | own))

    return attempt


_read = _kind("files", "read", FILE, EXTREMES)
_write = _kind("files", "write", FILE, EXTREMES)
_change = _kind("files", "write", CALL, (Phase.CLEAR,))
_connect = _kind("network", "network", CALL, SILENT, allowed=NETWORKING)
_socket = _kind("network", "network", CALL, EXTREMES)
_beyond_port = _kind("network", "network", CALL, EXTREMES, variant="ports", rights={"network": ["{tcp}"]})
_execute = _kind("programs", "exec", FILE | CALL, NOT_EXECUTING)
_reach = _kind("processes", "processes", HIDDEN, EXTREMES, unheld="nobody")
_system = _kind("system", "system", CALL, EXTREMES, unheld="root")
_limit = _kind("limits", "limits", frozenset(), EXTREMES)

_TO_READ = (
    _read("read the machine's passwords", "read_shadow", unheld="root"),
    _read("read a key in the home folder", "read_ssh_key", forbidden=tuple(Phase), worker=True),
    _read("list the home folder", "list_home"),
    _read("read another overlay's file", "read_another_overlay"),
    _read("list the overlays", "list_overlays"),
    _read("read what another overlay keeps", "read_anothers_state"),
    _read("read the ledger", "read_ledger"),
    _read("read the bus's settings", "read_settings"),
    _read("read a file that everybody may", "read_outside", worker=True),
    _read("read by a link in scratch", "read_by_link_in_scratch"),
    _read("read by the root folder of process 1", "read_by_root_of_proc", refused=FILE | {"ENOENT"}, unheld="nobody"),
    _read("read by the working folder", "read_by_working_folder"),
    _read("read by a handle", "read_by_handle", right="system", refused=CALL, unheld="root"),
    _read("watch a folder of others", "watch_folder", refused=CALL, forbidden=SILENT, allowed=NETWORKING),
    _read("find what other calls left", "find_leftovers", refused=FILE | {NOTHING}, unheld="nobody"),
    _read("find shared memory of others", "find_shared_memory", refused=FILE | {NOTHING}, unheld="nobody"),
    _read(
        "read a path that the manifest asks for",
        "read_granted",
        forbidden=(),
        allowed=EXTREMES,
        rights={"read": ["{outside}/readable"]},
    ),
)

_TO_WRITE = (
    _write("write to scratch", "write_scratch", forbidden=(), allowed=tuple(Phase), worker=True, unheld="nobody"),
    _write("use shared memory", "use_shared_memory", needs="namespace", forbidden=(), allowed=EXTREMES),
    _write("write to the overlay's state", "write_state", forbidden=(Phase.CLEAR,), allowed=WRITING, worker=True),
    _write("write a new file", "write_outside", forbidden=tuple(Phase), worker=True),
    _write("append to a file", "append_outside"),
    _write("append to the ledger", "append_to_ledger"),
    _write("truncate a file", "truncate_outside"),
    _write("make a folder", "make_folder_outside"),
    _write("make a fifo", "make_fifo_outside"),
    _write("make a device", "make_device_in_scratch", refused=FILE | CALL, unheld="nobody"),
    _write("make a link", "make_link_outside"),
    _write("remove a file", "remove_outside"),
    _write("remove a folder", "remove_folder_outside"),
    _write("rename a file", "rename_outside", refused=LINK),
    _write("rename a file out of scratch", "rename_from_scratch", refused=LINK, unheld="nobody"),
    _write("give a file another name", "hard_link_outside", refused=LINK),
    _write("give a file a name in the overlay's state", "hard_link_into_state", refused=LINK),
    _write("write by a link in scratch", "write_by_link_in_scratch"),
    _write("write by a link in the overlay's state", "write_by_link_in_state"),
    _write(
        "write by a descriptor for reading", "write_by_descriptor", rights={"read": ["{outside}/readable"]}, worker=True
    ),
    _write("write by a descriptor for nothing", "write_by_path_descriptor"),
    _write("write to a fifo of others", "write_to_fifo"),
    _write("write to the overlay's own folder", "write_own_folder"),
    _write("write to the overlay's own program", "write_own_program"),
    _write(
        "write to a path that the manifest asks for",
        "write_granted",
        forbidden=(Phase.CLEAR,),
        allowed=WRITING,
        rights={"write": ["{granted}"]},
    ),
    _change("change a mode", "change_mode"),
    _change("change an owner", "change_owner"),
    _change("change times", "change_times"),
    _change("change attributes", "change_attributes"),
    _change("remove attributes", "remove_attributes"),
)

_TO_CONNECT = (
    _connect("connect by TCP", "tcp", worker=True),
    _connect("connect by TCP over IPv6", "tcp6", needs="ipv6"),
    _connect("send by UDP", "udp"),
    _connect("send by UDP over IPv6", "udp6", needs="ipv6"),
    _connect("connect by multipath TCP", "multipath_tcp", needs="multipath"),
    _connect("connect by sending", "fast_open"),
    _connect("connect by a message", "fast_open_by_message"),
    _connect("connect to a socket by its path", "unix_path"),
    _connect("send to a socket by its path", "unix_datagram"),
    _connect("listen", "listen"),
    _connect("listen on whatever port", "listen_unbound"),
    _connect("ask for the machine's addresses", "netlink_route"),
    _socket("connect to an abstract socket", "unix_abstract"),
    _socket("make a pair of streams", "pair_of_streams", forbidden=(), allowed=EXTREMES),
    _socket("send by one of a pair", "pair_of_datagrams", forbidden=SILENT),
    _socket("make a raw socket", "raw", unheld="root"),
    _socket("make a socket for packets", "packet", unheld="root"),
    _socket("make a socket for SCTP", "sctp"),
    _socket("make a socket for the audit", "netlink_audit"),
    _socket("make a socket for virtual machines", "virtual_machine"),
    _socket("make a socket for the kernel's ciphers", "kernel_crypto"),
    _socket("make a socket for raw frames", "express_path", unheld="root"),
    _socket("make a ring", "io_uring", right="system", needs="io_uring"),
    _socket(
        "use a socket opened before the rights", "inherited_sockets", refused=frozenset({NOTHING}), unheld="nobody"
    ),
)

_BEYOND_A_PORT = (
    _connect("connect to the port that the manifest names", "tcp", variant="named", rights={"network": ["{tcp}"]}),
    _beyond_port("connect to another port", "tcp_elsewhere", refused=FILE | CALL),
    _beyond_port("connect to it by multipath TCP", "multipath_tcp", needs="multipath"),
    _beyond_port("connect to it by sending", "fast_open"),
    _beyond_port("connect to it by a message", "fast_open_by_message"),
    _beyond_port("send by UDP instead", "udp"),
    _beyond_port("listen instead", "listen", refused=FILE | CALL),
    _beyond_port("listen on whatever port", "listen_unbound"),
    _beyond_port("connect though the manifest says none", "tcp", variant="none", rights={"network": False}),
)

_TO_EXECUTE = (
    _execute("execute a shell", "shell", allowed=(Phase.ASCEND,), worker=True),
    _execute("execute a shell by subprocess", "shell_by_python", allowed=(Phase.ASCEND,)),
    _execute("execute a shell by posix_spawn", "spawn", allowed=(Phase.ASCEND,)),
    _execute("execute by a descriptor", "by_descriptor", allowed=(Phase.ASCEND,)),
    _execute(
        "execute by the loader",
        "by_loader",
        refused=FILE | CALL | {NOTHING},
        allowed=(Phase.ASCEND,),
        needs="loader",
        worker=True,
    ),
    _execute("execute from memory", "from_memory", worker=True),
    _execute("execute from stdin", "from_stdin", unheld="nobody"),
    _execute("execute from stdout", "from_stdout"),
    _execute("execute a copy in scratch", "from_scratch"),
    _execute("execute a copy in the overlay's state", "from_state", forbidden=(Phase.OPEN, Phase.SEAL)),
    _execute("execute a script in scratch", "script_in_scratch"),
    _execute("execute a script that came along", "script_in_own_folder", allowed=(Phase.ASCEND,)),
)

_TO_REACH = (
    _reach("read the environment of process 1", "read_first_environment", refused=HIDDEN | {NOTHING}),
    _reach("read the environment of the bus", "read_environment_of_bus", refused=HIDDEN | {NOTHING}),
    _reach("read any environment", "read_any_environment", refused=HIDDEN | {NOTHING}, worker=True),
    _reach("find secrets of the bus in the own environment", "read_own_environment", refused=frozenset({NOTHING})),
    _reach("read the memory of the bus", "read_memory_of_bus"),
    _reach("see what the bus has open", "read_descriptors_of_bus"),
    _reach("read by the root folder of the bus", "read_by_root_of_bus"),
    _reach("read the memory of another overlay", "read_memory_of_sibling"),
    _reach("read the environment of another overlay", "read_environment_of_sibling", refused=HIDDEN | {NOTHING}),
    _reach("spare the bus from the killer of memory", "spare_from_memory_killer"),
    _reach("signal the bus", "signal_bus", worker=True),
    _reach("signal a thread of the bus", "signal_thread_of_bus"),
    _reach("signal the bus by a descriptor", "signal_bus_by_descriptor"),
    _reach("signal the group of the bus", "signal_group_of_bus"),
    _reach("signal another overlay", "signal_sibling"),
    _reach("limit the bus", "limit_bus"),
    _reach("slow the bus", "slow_bus"),
    _reach("bind the bus to a core", "bind_bus"),
    _reach("schedule the bus otherwise", "schedule_bus"),
    _reach("find memory of others by its number", "find_system_v_memory"),
    _reach("trace the bus", "trace_bus"),
    _reach("trace another overlay", "trace_sibling"),
    _reach("trace an own child", "trace_own_child", refused=CALL, unheld="everybody"),
    _reach("read the memory of an own child", "read_child_by_vm", refused=CALL, unheld="everybody"),
    _reach("take a descriptor of an own child", "take_descriptor_of_child", refused=CALL, unheld="everybody"),
    _reach("compare with an own child", "compare_with_child", refused=CALL, right="system", unheld="everybody"),
    _reach("run on after the answer", "run_on", forbidden=(), allowed=EXTREMES),
    _reach("end an own child", "kill_own_child", forbidden=(), allowed=EXTREMES),
)

_TO_CHANGE_THE_MACHINE = (
    _system("mount", "mount"),
    _system("mount a folder elsewhere", "bind_mount"),
    _system("unmount", "unmount"),
    _system("clone a mount", "clone_mount"),
    _system("open a file system", "open_filesystem"),
    _system("make a user namespace", "user_namespace", unheld="everybody"),
    _system("make a network namespace", "network_namespace"),
    _system("make a namespace by clone3", "clone_namespace", refused=frozenset({"ENOSYS"}), unheld="everybody"),
    _system("join a namespace", "join_namespace"),
    _system("change the root folder", "change_root"),
    _system("change the root of mounts", "pivot_root"),
    _system("load a program into the kernel", "bpf"),
    _system("ask for a keyring", "keyring", unheld="everybody"),
    _system("add a key", "add_key", unheld="everybody"),
    _system("serve page faults", "user_faults"),
    _system("count events", "performance_events", unheld="everybody"),
    _system("watch files", "file_events"),
    _system("load a kernel", "load_kernel"),
    _system("load a module", "load_module"),
    _system("load a module from a file", "load_module_file"),
    _system("rename the machine", "rename_host"),
    _system("set the time", "set_time", unheld="everybody"),
    _system("set a clock", "set_clock", unheld="everybody"),
    _system("swap", "swap"),
    _system("restart the machine", "reboot"),
    _system("account for processes", "account"),
    _system("ask for quotas", "quota", unheld="everybody"),
    _system("change the personality", "personality", unheld="everybody"),
    _system("call by foreign numbers", "foreign_numbers", needs="i386", unheld="everybody"),
    _system("call as another architecture", "foreign_abi", needs="i386", unheld="everybody"),
    _system("type for the terminal", "type_for_terminal", unheld="everybody"),
    _system("regain capabilities", "regain_capabilities"),
    _system("become root by a program", "become_root_by_program", unheld="everybody"),
    _system("write a setting of the kernel", "write_kernel_setting", right="write", refused=FILE | CALL),
)

_TO_TAKE_MORE = (
    _limit("fill scratch by one file", "fill_scratch", refused=frozenset({"ENOSPC", "EFBIG"}), unheld="nobody"),
    _limit(
        "fill shared memory",
        "fill_shared_memory",
        refused=frozenset({"ENOSPC", "EFBIG"}),
        unheld="nobody",
        needs="namespace",
    ),
    _limit(
        "fill scratch by many files",
        "fill_scratch_with_many",
        code="ERR_SCRATCH_LIMIT",
        unheld="nobody",
    ),
    _limit("open many files", "open_many_files", refused=frozenset({"EMFILE"}), unheld="nobody"),
    _limit("start many processes", "start_many_processes", code="ERR_PROCESS_LIMIT", unheld="nobody"),
    _limit("start many siblings", "start_many_siblings", code="ERR_PROCESS_LIMIT", unheld="nobody"),
    _limit("leave many processes behind", "leave_many_behind", refused=frozenset({NOTHING}), unheld="nobody"),
    _limit("allocate beyond the hard limit", "allocate", refused=frozenset({"ENOMEM"}), unheld="nobody", worker=False),
    _limit("allocate within it", "allocate_little", forbidden=(), allowed=EXTREMES),
    _limit("raise the limit of memory", "raise_limit_of_memory", refused=CALL, unheld="nobody"),
    _limit("raise the limit of files", "raise_limit_of_files", refused=CALL, unheld="nobody"),
    _limit("raise the limit of cores", "raise_limit_of_core", refused=CALL, unheld="root"),
)

ATTEMPTS: tuple[Attempt, ...] = (
    *_TO_READ,
    *_TO_WRITE,
    *_TO_CONNECT,
    *_BEYOND_A_PORT,
    *_TO_EXECUTE,
    *_TO_REACH,
    *_TO_CHANGE_THE_MACHINE,
    *_TO_TAKE_MORE,
)
