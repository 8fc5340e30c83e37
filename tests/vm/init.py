"""Process 1 of the virtual machine: mounts what tests need, runs pytest, and powers off.

Its one argument is a list of those of pytest, as hex of JSON.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent

MOUNTS = (
    ("proc", "/proc", "proc"),
    ("sysfs", "/sys", "sysfs"),
    ("tmpfs", "/tmp", "tmpfs"),
    ("tmpfs", "/run", "tmpfs"),
    ("tmpfs", "/dev/shm", "tmpfs"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2"),
)
NEEDED = (REPO, Path(sys.prefix))
"""What is still to be seen when all is mounted."""

MS_BIND = 4096
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
RB_POWER_OFF = 0x4321FEDC
ENVIRONMENT = {
    "PATH": os.defpath + ":/usr/local/bin:/usr/sbin:/sbin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
}

libc = ctypes.CDLL(None, use_errno=True)


def mount_all() -> None:
    for source, place, kind in MOUNTS:
        if place.startswith("/dev/"):
            Path(place).mkdir(exist_ok=True)
        covered = [(path, os.open(path, os.O_PATH)) for path in NEEDED if path.is_relative_to(place)]
        mount(source, place, kind)
        for path, fd in covered:  # of a checkout in /tmp
            path.mkdir(parents=True, exist_ok=True)
            mount(f"/proc/self/fd/{fd}", str(path), "", MS_BIND)
            os.close(fd)


def mount(source: str, place: str, kind: str, flags: int = 0) -> None:
    if libc.mount(source.encode(), place.encode(), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), place)


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("16sh14x", b"lo", 0)
        name, flags = struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, asked))
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", name, flags | IFF_UP))


def main() -> int:
    mount_all()
    bring_up_loopback()
    arguments = json.loads(bytes.fromhex(sys.argv[1]))  # the kernel splits at spaces, and adds a word of its own
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=REPO, env=ENVIRONMENT, check=False).returncode


if __name__ == "__main__":
    try:
        status = main()
    except BaseException:  # noqa: BLE001  # process 1 must not end
        traceback.print_exc()
        status = 70
    sys.stdout.write(f"\nexit status {status}\n")
    sys.stdout.flush()
    os.sync()
    libc.reboot(RB_POWER_OFF)
