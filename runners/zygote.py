"""Python scripts run by fork: what is loaded once, before the calls, and what a forked child does to be a new process.

`prepare` compiles the script and loads what it will import. `Program.run` has calls served, and in a forked child runs
the script as `__main__` and ends the process. Nothing of that may show: the script finds itself in an interpreter that
was just started, and its end is that of an interpreter. Standard library only, for any CPython from 3.8 on.

Loading early is right only where nothing can tell. So the script is read from the top, and with it the overlay's own
modules that it imports, in the order in which they would run. Reading ends at the first statement that does something:
what comes after may depend on it (`os.environ["X"] = ...`, then an import that reads it). The overlay's own code never
runs here. Each module that is loaded is watched, and one that does more than define things (a thread, a socket, a
line printed, a variable set) is left to the children, with all that follows it.

`zygote_script` says what that is, `zygote_reading` finds what it imports, `zygote_loading` loads that and watches it,
`zygote_ending` ends a child.

The script runs with no frame below its own, as it does in a new interpreter: `run` raises an exception that nobody
catches, and the interpreter, its stack empty, calls `sys.excepthook`. From there calls are waited for.

A page that is written to after a fork is copied, which takes more than a microsecond, and to look at a Python object is
to write to it: these copies are the largest part of what a call costs. So what can be done before the fork is done
there, objects that a child has no use for are kept from being freed in it, and what every child does is rehearsed.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it
import gc
import os
import resource  # now, while no module of the script's can stand in its place
import sys
from _weakref import ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, NoReturn

    from runners.zygote_ending import INTERRUPTED, End, report
    from runners.zygote_loading import Loader, process_status
    from runners.zygote_reading import read_apart
    from runners.zygote_script import MAIN, Main, Own, UnfitError, new_main
else:
    from zygote_ending import INTERRUPTED, End, report
    from zygote_loading import Loader, process_status
    from zygote_reading import read_apart
    from zygote_script import MAIN, Main, Own, UnfitError, new_main


def prepare(arguments: list[str], preload: list[str], skip: list[str], room: str) -> Program:
    """Compile a script, and load what it imports before anything else, then `preload`; nothing of `skip`.

    `arguments` is what stands after the interpreter's options: `["run.py"]` or `["-m", "package.module"]`, `room` a
    folder that may be written to. Where the
    program that comes back has something `unclean`, this process is not to be used: start another with that in `skip`.
    Raises `UnfitError`.
    """
    _check_interpreter()
    forget_what_is_not_fresh()
    script = Main(arguments, room)
    own = Own([os.getcwd(), script.folder])
    program = Program(script)
    with_script = Stage(script)
    requests, left = read_apart(script, own)
    loader = Loader(own, skip, left, room)
    loader.load(requests, preload)
    program.loaded, program.left, program.unclean = loader.loaded, loader.left, loader.unclean
    with_script.leave()
    program.settle()
    return program


def _check_interpreter() -> None:
    if sys.implementation.name != "cpython":
        raise UnfitError("%s is not CPython" % sys.implementation.name)
    if process_status()["Threads"] != "1":
        raise UnfitError("the interpreter starts threads before it comes to the script")


def forget_what_is_not_fresh() -> None:
    """Take out of `sys.modules` what was imported since the interpreter's start: a script is to find its own.

    An import puts the module at the end once it has run, so what the start imported stands before `site`, or, without
    `site`, before `__main__`.
    """
    names = list(sys.modules)
    last = names.index("site" if "site" in sys.modules else MAIN)
    for name in names[last + 1 :]:
        del sys.modules[name]


class Stage:
    """What a module that is loaded may look at: the script's `sys.argv`, `sys.path` and an empty `__main__`."""

    def __init__(self, script: Main) -> None:
        sys.argv = list(script.argv)
        if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
            sys.path.insert(0, script.folder)
        sys.modules[MAIN] = new_main(script)

    def leave(self) -> None:
        """Keep no `__main__` but one that a module holds on to."""
        main = ref(sys.modules.pop(MAIN))
        found = main()
        if found is not None:
            sys.modules[MAIN] = found


def _unseen(function: Any) -> Any:
    """A function whose frame does not show in tracebacks, nor to `sys._getframe`, from CPython 3.11 on.

    A frame counts as begun once it has passed the RESUME instruction, which comes first; this one never does.
    """
    if sys.version_info >= (3, 11):
        from opcode import opmap

        code = function.__code__
        instructions = bytearray(code.co_code)
        if instructions[0] == opmap["RESUME"]:
            instructions[0] = opmap["NOP"]
            function.__code__ = code.replace(co_code=bytes(instructions))
    return function


class _Unwind(BaseException):
    """Takes this process down to the bottom of its stack."""


REHEARSALS = 20
"""How often: CPython 3.11 adapts what has run eight times, and tries again some times."""


class Program:
    """A script with its imports loaded.

    `loaded`: the modules that the children find there. `left`: the modules that are left to them, and why. `unclean`:
    modules that did more than define things, and what that was; if there is one, this process is not to be used.
    """

    def __init__(self, script: Main) -> None:
        self.loaded = []  # type: list[str]
        self.left = {}  # type: dict[str, str]
        self.unclean = {}  # type: dict[str, str]
        self._script = script
        if script.module is not None:
            from runpy import _run_module_as_main  # type: ignore[attr-defined]

            self._run_module = _run_module_as_main
        self._options = list(getattr(sys, "orig_argv", ()))[: -len(sys.argv)]
        self._known = os.environ._data  # type: ignore[attr-defined]
        """What `os.environ` holds. All that it does beside, in Python, would be copied for each child."""
        self._kept = []  # type: list[Any]

    def keep(self, thing: Any) -> None:
        """A child is not to take it apart, which would copy it piece by piece. Nor would that be without effect."""
        self._kept.append(thing)

    @staticmethod
    def rehearse(what: Callable[[], None]) -> None:
        """Do early, and often, what every child will do, and which changes nothing here.

        What CPython learns of it (from 3.11 on it adapts its code, and it remembers where it found attributes) and the
        linker is written into memory, which is copied for each child that writes there.
        """
        for _ in range(REHEARSALS):
            what()

    def settle(self) -> None:
        """Nothing more will be loaded."""
        self._renew = [renew for name, renew in RENEWALS if name in sys.modules]
        self._late = _late_modules()
        self._end = End()
        _restore_signals()
        self.rehearse(self.touch)
        gc.collect()

    def run(self, next_call: Callable[[], tuple[list[str], dict[bytes, bytes]]]) -> NoReturn:
        """Serve calls, each in a child that is a new interpreter and runs the script, to its end.

        `next_call` returns in each of these children, and nowhere else: with arguments as for `prepare`, to which the
        call has added, and what to add to the environment.
        """
        self._next_call = next_call
        sys.excepthook = self._begin
        raise _Unwind

    def _set_out(self) -> None:
        """Put among the modules what is to come last: the script's, and what no child is to know of."""
        if MAIN not in sys.modules:
            sys.modules[MAIN] = new_main(self._script)
        sys.modules.update(self._late)

    def touch(self) -> None:
        """Write to much of what a child will write to: a rehearsal here; in a child that waits it is copied by then."""
        self._become_new(sys.argv, {b"PATH": os.environb[b"PATH"]} if b"PATH" in os.environb else {})
        self._end.rehearse()

    def _become_new(self, arguments: list[str], env: dict[bytes, bytes]) -> None:
        """Let the script find what a new interpreter has of its own."""
        known, putenv = self._known, os.putenv
        for name, value in env.items():
            putenv(name, value)
            known[name] = value
        script = self._script
        self._end.forget_new_modules()
        sys.argv = list(arguments) if script.module is None else ["-m"] + arguments[2:]
        if self._options:
            sys.orig_argv = self._options + arguments
        for renew in self._renew:
            renew()

    @_unseen
    def _begin(self, _kind: type, _unwind: BaseException, _traceback: TracebackType) -> None:
        """Called by the interpreter, on an empty stack. So it is one for the children, too, and none has to unwind.

        What is there by now, the exception that led here and its frames too, the collector of a child is not to look
        through: that would copy it. It is to look through `__main__`, which therefore comes after.
        """
        sys.excepthook = sys.__excepthook__
        _forget_last_exception()
        gc.freeze()
        self._set_out()
        self._become_new(*self._next_call())
        status = 0
        try:
            if self._script.module is not None:
                self._run_module(self._script.module)
            else:
                exec(self._script.code or self._script.compile(), vars(sys.modules[MAIN]))  # noqa: S102
        except BaseException as error:  # noqa: BLE001  # the outermost of the script
            status = _failed(error)
        self._end(status)


def _late_modules() -> dict[str, Any]:
    """What `os.wait4` imports, each time that it does not find it."""
    return {} if "resource" in sys.modules else {"resource": resource}


def _failed(error: BaseException) -> int:
    """What the interpreter does with what a script raised. Returns the exit status."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
    status = report(error)
    return INTERRUPTED if type(error) is KeyboardInterrupt else status


def _forget_last_exception() -> None:
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(name, None)


def _restore_signals() -> None:
    """As the interpreter sets them at its start."""
    for number, handler in (
        (_signal.SIGINT, _signal.default_int_handler),
        (_signal.SIGPIPE, _signal.SIG_IGN),
        (_signal.SIGXFSZ, _signal.SIG_IGN),
    ):
        if _signal.getsignal(number) != handler:
            _signal.signal(number, handler)


# What modules keep from the time of their import, and every process has its own. (`random` sees to itself.)


def _renew_numpy() -> None:
    sys.modules["numpy.random"].seed()


def _renew_logging() -> None:
    """`relativeCreated` of a record counts from here; in nanoseconds from 3.13 on."""
    import time

    logging = sys.modules["logging"]
    logging._startTime = time.time_ns() if isinstance(logging._startTime, int) else time.time()  # type: ignore[attr-defined]


def _renew_multiprocessing() -> None:
    process = sys.modules["multiprocessing.process"]
    process.current_process()._config["authkey"] = process.AuthenticationString(os.urandom(32))


def _renew_threading() -> None:
    main_thread = sys.modules["threading"].main_thread()
    if hasattr(main_thread, "_set_native_id"):
        main_thread._set_native_id()


RENEWALS = (
    ("numpy.random.mtrand", _renew_numpy),
    ("logging", _renew_logging),
    ("multiprocessing.process", _renew_multiprocessing),
    ("threading", _renew_threading),
)
