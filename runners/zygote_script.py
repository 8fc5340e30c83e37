"""What a zygote is about: the script that is to run, and whose code is whose."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

MAIN = "__main__"


class UnfitError(Exception):
    """This script cannot be run by fork. The message says why."""


class MissingError(Exception):
    """An import that would fail: no such module."""


class Main:
    """What is to run: a file, or with `module` set a module by its name.

    `code` is None where compiling it says something (a SyntaxWarning): then each child compiles it, and says it.
    `room` is as for `Capture`.
    """

    def __init__(self, arguments: Sequence[str], room: str) -> None:
        self.module = arguments[1] if arguments[0] == "-m" else None
        self.argv = list(arguments)
        self.file = arguments[0]
        self.folder = os.getcwd()
        self._room = room
        self.source = b""
        self.code = None  # type: CodeType | None
        if self.module is None:
            self.folder = os.path.dirname(os.path.realpath(self.file))
            if sys.version_info >= (3, 9):
                self.file = os.path.join(os.getcwd(), self.file)
            self._read()

    def _read(self) -> None:
        for hook in sys.path_hooks:
            if _accepts(hook, self.file):
                raise UnfitError("%s is a folder or an archive" % self.argv[0])
        try:
            with open(self.file, "rb") as file:
                self.source = file.read()
            with Capture(self._room) as said:
                code = self.compile()
                self.code = None if said.size else code
        except OSError as error:
            raise UnfitError("%s cannot be read: %s" % (self.argv[0], error.strerror)) from None
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise UnfitError("%s cannot be compiled: %s" % (self.argv[0], error)) from None

    def compile(self) -> CodeType:
        return compile(self.source, self.file, "exec", dont_inherit=True)


def _accepts(hook: Callable[[str], Any], path: str) -> bool:
    try:
        hook(path)
    except ImportError:
        return False
    return True


class Own:
    """Tells the overlay's own code, which runs anew for each call, from what is installed."""

    def __init__(self, folders: Iterable[str]) -> None:
        self._folders = [os.path.realpath(folder) + os.sep for folder in folders]
        installed = [sys.prefix, sys.base_prefix] + [folder + ".venv" for folder in self._folders]
        self._installed = [
            path + os.sep for path in map(os.path.realpath, installed) if path.startswith(tuple(self._folders))
        ]

    def has(self, spec: ModuleSpec) -> bool:
        paths = [spec.origin] if spec.has_location else spec.submodule_search_locations or ()
        return any(self._has_path(os.path.realpath(path)) for path in paths if path)

    def _has_path(self, path: str) -> bool:
        return path.startswith(tuple(self._folders)) and not path.startswith(tuple(self._installed))


class Capture:
    """Takes what is written to stdout and stderr, by their descriptors. `size` is how many bytes that were so far.

    It goes to a file without a name in the folder `room`: a file in memory could be executed, so it may be refused.
    """

    def __init__(self, room: str) -> None:
        self._room = room

    def __enter__(self) -> Capture:
        flush_quietly()
        self._kept = [os.dup(1), os.dup(2)]
        self._file = _nameless_file(self._room)
        os.dup2(self._file, 1)
        os.dup2(self._file, 2)
        return self

    def __exit__(self, *_: object) -> None:
        flush_quietly()
        os.dup2(self._kept[0], 1)
        os.dup2(self._kept[1], 2)
        for fd in self._kept:
            os.close(fd)
        os.close(self._file)

    @property
    def size(self) -> int:
        flush_quietly()
        return os.fstat(self._file).st_size


def _nameless_file(folder: str) -> int:
    """Not every file system has O_TMPFILE."""
    path = os.path.join(folder, "said-%d" % os.getpid())
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return fd


STREAMS = ("stderr", "stdout")


def flush_quietly() -> None:
    for name in STREAMS:
        try:
            getattr(sys, name).flush()
        except Exception:  # noqa: BLE001  # a stream may be anything, or None; what is wrong is told at the end
            pass


_PATTERN = sys.modules[MAIN]
"""The `__main__` that this interpreter made: the names in it and their order differ from version to version."""


def new_main(script: Main) -> ModuleType:
    """A `__main__` as the interpreter makes it for a script."""
    main = type(sys)(MAIN)
    namespace = vars(main)
    for name in vars(_PATTERN):
        if name == "__annotations__":
            namespace[name] = {}
        elif name == "__builtins__":
            namespace[name] = sys.modules["builtins"]
        elif script.module is None and name == "__file__":
            namespace[name] = script.file
        elif script.module is None and name == "__cached__":
            namespace[name] = None
    loader = type(vars(_PATTERN)["__loader__"])
    namespace["__loader__"] = loader(MAIN, script.file) if script.module is None else vars(sys)["__loader__"]
    return main
