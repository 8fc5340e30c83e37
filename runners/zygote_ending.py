"""The end of a forked child as that of an interpreter, as Python/pythonrun.c and Python/pylifecycle.c have it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it
import builtins
import ctypes  # now, while no module of the script's can stand in its place
import gc
import os
import sys
from _weakref import ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NoReturn

    from runners.zygote_script import MAIN, STREAMS
else:
    from zygote_script import MAIN, STREAMS

INTERRUPTED = -2
"""Not an exit status: the process ends itself by SIGINT, so that who waits for it knows."""


def report(error: BaseException) -> int:
    """What the interpreter does with an exception that nobody caught (`PyErr_Print`). Returns the exit status."""
    if isinstance(error, SystemExit):
        return _exit_status(error)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    hook = getattr(sys, "excepthook", None)
    if hook is None:
        _say("sys.excepthook is missing\n")
        hook = sys.__excepthook__
    try:
        hook(type(error), error, error.__traceback__)
    except SystemExit as leaving:
        return _exit_status(leaving)
    except BaseException as second:  # noqa: BLE001  # said, like the first
        trace = second.__traceback__ and second.__traceback__.tb_next
        _say("Error in sys.excepthook:\n")
        second.__context__ = None
        sys.__excepthook__(type(second), second.with_traceback(trace), trace)
        _say("\nOriginal exception was:\n")
        sys.__excepthook__(type(error), error, error.__traceback__)
    return 1


def _exit_status(leaving: SystemExit) -> int:
    """None is 0, a number is itself (its lowest byte is what the system keeps), anything else is said and 1."""
    code = leaving.code
    if code is None:
        return 0
    if isinstance(code, int):
        return int(code) & 0xFF if -(2**63) <= code < 2**63 else 0xFF
    _say(code)
    _say("\n")
    return 1


def _say(what: Any) -> None:
    try:
        sys.stderr.write(str(what))
    except Exception:  # noqa: BLE001  # there is nowhere to say it
        pass


SYS_NAMES = (
    *("path", "argv", "ps1", "ps2", "last_exc", "last_type", "last_value", "last_traceback"),
    *("path_hooks", "path_importer_cache", "meta_path", "__interactivehook__"),
)
"""What of `sys` the interpreter sets to None before it lets go of the modules."""


class End:
    """Ends a process as an interpreter does at its end, without taking apart what it was given (that takes 3 ms).

    What was loaded before the calls is let go only where something that the script made lives on in it and waits to be
    finalized. Made before the fork, and called once.
    """

    def __init__(self) -> None:
        self._last = next(reversed(sys.modules))
        self._kept = [getattr(sys, name, None) for name in SYS_NAMES]  # or a child would free it, piece by piece
        self._forgotten = []  # type: list[Any]
        self._last_builtin = next(reversed(vars(builtins)))
        self._tell = _make_teller()
        self._never_finalized = _never_finalized()
        self._flush_c = _c_flusher() if _use_c(list(sys.modules)) else None

    def __call__(self, status: int) -> NoReturn:
        leave, interrupted, flushed = os._exit, status == INTERRUPTED, True
        try:
            _join_threads(self._tell)
            _call_exit_functions()
            flushed = _flush(self._tell)
            flush_c = self._flush_c or (_c_flusher() if _use_c(list(self._new_modules())) else None)
            if gc.isenabled():
                gc.collect()
            kill, itself, signal = os.kill, os.getpid(), _signal.signal
            self._let_go()
            flushed = _flush() and flushed
            if flush_c is not None:
                flush_c(None)
            if interrupted:
                signal(_signal.SIGINT, _signal.SIG_DFL)
                kill(itself, _signal.SIGINT)
        finally:
            leave(status if flushed else 120)

    def rehearse(self) -> None:
        """What of a child's end changes nothing here (see `Program.rehearse`)."""
        _flush(self._tell)
        _use_c(list(self._new_modules()))
        _let_go_of([])
        any(map(_is_finalized, {End, int} - self._never_finalized))

    def forget_new_modules(self) -> None:
        """Of what the launcher has imported since (`os.wait4` wants `resource`) the script is to know nothing."""
        modules = sys.modules
        name = next(reversed(modules))
        while name not in (self._last, MAIN):
            self._forgotten.append(modules.pop(name))
            name = next(reversed(modules))

    def _new_modules(self) -> Iterator[str]:
        """The names of modules that came after the fork, the latest first."""
        return (name for name in _added(sys.modules, self._last) if name != MAIN)

    def _let_go(self) -> None:
        """First what the script loaded and made. Where some of that still waits to be finalized, all the rest."""
        for name in SYS_NAMES:
            setattr(sys, name, None)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        collect, unfreeze, objects, modules = gc.collect, gc.unfreeze, gc.get_objects, sys.modules
        alive = _let_go_of([MAIN] + list(self._new_modules())[::-1])
        for name in list(_added(vars(builtins), self._last_builtin)):
            delattr(builtins, name)
        collect()
        if any(map(_is_finalized, set(map(type, objects())) - self._never_finalized)):
            unfreeze()
            alive = _let_go_of([name for name in modules if name not in ("sys", "builtins")]) + alive
            collect()
            for found in reversed(alive):
                module = found()
                if module is not None:
                    _empty(vars(module))
                del module


def _added(namespace: dict[str, Any], last: str) -> Iterator[str]:
    """The names that came after `last`, the latest first. To look at each of the others would copy it."""
    for name in reversed(namespace):
        if name == last:
            return
        yield name


def _let_go_of(names: Iterable[str]) -> list[Any]:
    """Take modules out, in order. Returns weak references to them."""
    alive = []
    for name in names:
        module = sys.modules.pop(name, None)
        if isinstance(module, type(sys)):
            alive.append(ref(module))
        del module
    return alive


def _empty(namespace: dict[str, Any]) -> None:
    """Names with one underscore first (`_PyModule_ClearDict`)."""
    for name in list(namespace):
        if isinstance(name, str) and name[:1] == "_" and name[1:2] != "_":
            namespace[name] = None
    for name in list(namespace):
        if isinstance(name, str) and (name[:1] != "_" or name != "__builtins__"):
            namespace[name] = None


def _is_finalized(kind: type) -> bool:
    return any("__del__" in vars(base) for base in type.mro(kind))


_HEAP_TYPE = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`: not one of those that C has as they are, which nobody changes."""


def _never_finalized() -> frozenset[type]:
    """Types of which that is known without a look at them."""
    kinds = [object]  # type: list[type]
    for kind in kinds:  # it grows meanwhile; what such a type comes from is one, too
        below = type.__subclasses__(kind)  # type: list[type]
        kinds += [found for found in below if not found.__flags__ & _HEAP_TYPE]
    return frozenset(kind for kind in kinds if not _is_finalized(kind))


def _join_threads(tell: Callable[[BaseException, object, str], None]) -> None:
    threading = sys.modules.get("threading")  # type: Any
    if threading is None:
        return
    try:
        threading._shutdown()
    except BaseException as error:  # noqa: BLE001  # the end goes on
        tell(error, threading, "threading shutdown")
    import _thread

    if _thread._count():
        threading.excepthook = lambda _: None  # a daemon thread ends in silence, when all is taken from under it


def _call_exit_functions() -> None:
    """They are called, and what goes wrong is said, by `atexit` itself; up to 3.9 it also raises the last of it."""
    atexit = sys.modules.get("atexit")
    if atexit is not None:
        try:
            atexit._run_exitfuncs()
        except BaseException:  # noqa: BLE001
            pass


def _flush(tell: Callable[[BaseException, object, str], None] | None = None) -> bool:
    """False where something that was written is lost. What went wrong with stdout is told."""
    flushed = True
    for name in reversed(STREAMS):
        stream = getattr(sys, name, None)
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException as error:  # noqa: BLE001  # the end goes on
            flushed = False
            if tell is not None and name == "stdout":
                tell(error, stream, "flushing sys.stdout")
    return flushed


class _Raises:
    def __del__(self) -> None:
        raise RuntimeError


def _make_teller() -> Callable[[BaseException, object, str], None]:
    """What says "Exception ignored in". The type of its argument has no name, but there is one to look at."""
    seen = []  # type: list[Any]
    hook, sys.unraisablehook = sys.unraisablehook, seen.append
    _Raises()
    sys.unraisablehook = hook
    kind = type(seen[0])

    def tell(error: BaseException, where: object, words: str) -> None:
        trace = error.__traceback__ and error.__traceback__.tb_next
        said = ("Exception ignored on " + words, None) if sys.version_info >= (3, 13) else (None, where)
        sys.unraisablehook(kind((type(error), error, trace) + said))

    return tell


def _use_c(names: Iterable[str]) -> bool:
    """Whether one of the modules may write by C's `printf`, which holds back what it was given."""
    for name in names:
        file = getattr(sys.modules[name], "__file__", None)
        if name == "_ctypes" or (isinstance(file, str) and ".so" in file and "lib-dynload" not in file):
            return True
    return False


def _c_flusher() -> Any:
    return ctypes.PyDLL(None).fflush
