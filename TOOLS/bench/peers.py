"""The peers: servers of others that do the same job, where Debian has them, with the same programs behind them.

    webhook   adnanh/webhook, in Go. It gives a program no stdin, only arguments, variables and files. A variable with
              the `raw-request-body` is the fastest of them: no JSON made anew, no file written. The echo programs take
              it for their input; from there on they do the same work. It answers with what the program wrote.
    lighttpd  in C, with mod_cgi: body on stdin, a header and the answer on stdout. One worker process and epoll, as it
              is shipped; the limits of calls per connection and of descriptors are raised, so that nothing but the
              work is measured.

What is on the PATH is taken. What is not is fetched by `apt-get download` and unpacked into the working folder of this
run, as any user may: nothing is installed, no service is begun, and it goes with the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from layout import PROGRAMS, BenchError, overlay_of, python_of

if TYPE_CHECKING:
    from collections.abc import Sequence

FETCH_S = 120.0
"""How long `apt-get` may take for one thing."""

CHECK_S = 10.0
"""How long a peer may take to say its version."""

_BINARIES = ("usr/bin", "usr/sbin")
_VERSION = {"webhook": "-version", "lighttpd": "-v"}


def find(name: str, folder: Path) -> Path:
    """The program of a peer, which runs here; fetched into `folder` where it is not on the PATH.

    Raises `BenchError` that says what is missing.
    """
    unpacked = folder / "peers"
    program = installed(name) or _fetch(name, unpacked)
    done = _run([str(program), _VERSION[name]], folder, CHECK_S)
    if done.returncode:
        raise BenchError(f"{name} does not run here: {_words(done)}")
    return program


def installed(name: str) -> Path | None:
    from_path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = shutil.which(name, path=os.pathsep.join([*from_path, "/usr/sbin"]))
    return None if found is None else Path(found)


def _fetch(name: str, unpacked: Path) -> Path:
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise BenchError(f"{name} is not on the PATH, and there is no {missing[0]} to fetch it")
    unpacked.mkdir(exist_ok=True)
    _download(name, unpacked)
    for package in unpacked.glob(f"{name}_*.deb"):
        done = _run(["dpkg-deb", "-x", package.name, "."], unpacked, FETCH_S)
        if done.returncode:
            raise BenchError(f"the package of {name} cannot be unpacked: {_words(done)}")
    program = next((path for folder in _BINARIES if (path := unpacked / folder / name).exists()), None)
    if program is None:
        raise BenchError(f"the package of {name} has no program of that name")
    return program


def _download(name: str, unpacked: Path) -> None:
    """By the machine's package lists; where it has none, by lists fetched for this run."""
    if _run(["apt-get", "download", name], unpacked, FETCH_S).returncode == 0:
        return
    (unpacked / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::lists={unpacked}/lists", "-o", f"Dir::Cache={unpacked}"]
    _run(["apt-get", *own, "update"], unpacked, FETCH_S)
    done = _run(["apt-get", *own, "download", name], unpacked, FETCH_S)
    if done.returncode:
        raise BenchError(f"{name} is not on the PATH, and apt-get does not fetch it: {_words(done)}")


def _run(argv: Sequence[str], cwd: Path, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a tool. Raises `BenchError` where it cannot start or takes too long."""
    try:
        return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=limit_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{argv[0]}: {error}") from None


def _words(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr + done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def command(name: str, program: Path, folder: Path, port: int) -> list[str]:
    """How to start a peer on this port of 127.0.0.1; writes its configuration into `folder`."""
    if name == "webhook":
        hooks = folder / "hooks.json"
        hooks.write_text(json.dumps(hooks_of(folder), indent=2))
        return [str(program), "-hooks", str(hooks), "-ip", "127.0.0.1", "-port", str(port)]
    configuration = folder / "lighttpd.conf"
    configuration.write_text(lighttpd_conf(folder, port))
    return [str(program), "-D", "-f", str(configuration), "-m", str(program.parent.parent / "lib" / "lighttpd")]


def hooks_of(folder: Path) -> list[dict[str, object]]:
    """A hook for each echo program; `POST /hooks/python` runs the script."""
    return [
        {
            "id": name,
            "execute-command": _executable(folder, name),
            "command-working-directory": str(overlay_of(folder, name)),
            "include-command-output-in-response": True,
            "pass-arguments-to-command": [{"source": "string", "name": word} for word in PROGRAMS[name].command[1:]],
            "pass-environment-to-command": [{"source": "raw-request-body", "envname": "REQUEST_BODY"}],
        }
        for name in ("python", "c")
    ]


def _executable(folder: Path, name: str) -> str:
    first = PROGRAMS[name].command[0]
    return str(python_of(folder) if first == "python3" else overlay_of(folder, name) / first)


def lighttpd_conf(folder: Path, port: int) -> str:
    """`POST /echo_python/run.py` runs the script, `POST /echo_c/echo` the C program (an empty handler: run the file).

    CGI programs get no environment but their own and PATH (mod_cgi); mod_setenv gives them the LANG that all have.
    """
    return f"""
server.modules = ("mod_setenv", "mod_cgi")
server.bind = "127.0.0.1"
server.port = {port}
server.document-root = "{folder / "overlays"}"
server.upload-dirs = ("{folder}")
server.event-handler = "linux-sysepoll"
server.max-worker = 0
server.max-fds = 4096
server.max-connections = 2048
server.max-keep-alive-requests = 65535
setenv.set-environment = ("LANG" => "C.UTF-8", "PYTHONDONTWRITEBYTECODE" => "1")
cgi.assign = (".py" => "{python_of(folder)}", "/echo" => "")
"""
