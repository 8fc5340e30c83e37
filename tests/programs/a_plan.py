"""Plans for a helper, as the bus makes them, of which a test gives what it is about."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
ALL = (1 << 16) - 1
"""Of the accesses to files (<linux/landlock.h>)."""

CONNECT_TCP = 1 << 1
SCOPES = 0b11

GETPPID = {"x86_64": 110, "aarch64": 173}
EXECVE = {"x86_64": 59, "aarch64": 221}
"""Numbers of system calls by machine."""

LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, EPERM = 0x7FFF0000, 0x00050001
"""Of <linux/bpf_common.h> and <linux/seccomp.h>."""


def a_plan(root: Path | str = "/nowhere", *, mounts: bool = True, **changes: Any) -> dict[str, Any]:
    """Nothing is taken but what `changes` say. With `mounts` scratch is memory where there is a namespace."""
    plan: dict[str, Any] = {
        "landlock": None,
        "seccomp": b"",
        "others": b"",
        "late": b"",
        "limits": [],
        "capabilities": None,
        "scratch": {"root": str(root), "mounts": mounts, "mb": 1, "bits": ALL & ~EXECUTE},
        "processes": 0,
        "strict": False,
    }
    return plan | changes


def landlock(*paths: tuple[Path | str, int], **changes: Any) -> dict[str, Any]:
    """All is denied that can be, but for these."""
    rules: dict[str, Any] = {"fs": ALL, "net": 0, "scoped": 0, "paths": [[str(path), bits] for path, bits in paths]}
    return {**rules, "ports": [], **changes}


def refusing(number: int) -> bytes:
    """A filter that lets every system call pass but this one, which gets EPERM."""
    program = [(LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
