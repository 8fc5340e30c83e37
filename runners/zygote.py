"""Python scripts run by fork: what is loaded once, before the calls, and what a forked child does to be a new process.

`prepare` compiles the script and loads what it will import. `Program.run`, in a forked child, runs the script as
`__main__` and ends the process. Nothing of that may show: the script finds itself in an interpreter that was just
started, and its end is that of an interpreter. Standard library only, for any CPython from 3.8 on.

Loading early is right only where nothing can tell. So the script is read from the top, and with it the overlay's own
modules that it imports, in the order in which they would run. Reading ends at the first statement that does something:
what comes after may depend on it (`os.environ["X"] = ...`, then an import that reads it). The overlay's own code never
runs here. Each module that is loaded is watched, and one that does more than define things (a thread, a socket, a
line printed, a variable set) is left to the children, with all that follows it.

The script runs with no frame below its own, as it does in a new interpreter: `run` raises an exception that nobody
catches, and the interpreter, its stack empty, calls `sys.excepthook`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it
import builtins
import gc
import marshal
import os
import sys
from _weakref import ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType, TracebackType
    from typing import Any, NoReturn

MAIN = "__main__"


class UnfitError(Exception):
    """This script cannot be run by fork. The message says why."""


def prepare(arguments: list[str], preload: list[str], skip: list[str]) -> Program:
    """Compile a script, and load what it imports before anything else, then `preload`; nothing of `skip`.

    `arguments` is what stands after the interpreter's options: `["run.py"]` or `["-m", "package.module"]`. Where the
    program that comes back has something `unclean`, this process is not to be used: start another with that in `skip`.
    Raises `UnfitError`.
    """
    _check_interpreter()
    forget_what_is_not_fresh()
    script = Script(arguments)
    own = Own([os.getcwd(), script.folder])
    program = Program(script)
    with_script = Stage(script)
    requests, left = read_apart(script, own)
    program.left.update(left)
    Loader(program, own, skip).load(requests, preload)
    with_script.leave()
    program.settle()
    return program


def _check_interpreter() -> None:
    if sys.implementation.name != "cpython":
        raise UnfitError("%s is not CPython" % sys.implementation.name)
    if _status()["Threads"] != "1":
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


class Script:
    """What is to run: a file, or with `module` set a module by its name.

    `code` is None where compiling it says something (a SyntaxWarning): then each child compiles it, and says it.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.module = arguments[1] if arguments[0] == "-m" else None
        self.argv = list(arguments)
        self.file = arguments[0]
        self.folder = os.getcwd()
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
            with Capture() as said:
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
    """Takes what is written to stdout and stderr, by their descriptors. `size` is how many bytes that were so far."""

    def __enter__(self) -> Capture:
        _flush_quietly()
        self._kept = [os.dup(1), os.dup(2)]
        self._file = os.memfd_create("said", os.MFD_CLOEXEC)
        os.dup2(self._file, 1)
        os.dup2(self._file, 2)
        return self

    def __exit__(self, *_: object) -> None:
        _flush_quietly()
        os.dup2(self._kept[0], 1)
        os.dup2(self._kept[1], 2)
        for fd in self._kept:
            os.close(fd)
        os.close(self._file)

    @property
    def size(self) -> int:
        _flush_quietly()
        return os.fstat(self._file).st_size


class Stage:
    """What a module that is loaded may look at: the script's `sys.argv`, `sys.path` and an empty `__main__`."""

    def __init__(self, script: Script) -> None:
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


_PATTERN = sys.modules[MAIN]
"""The `__main__` that this interpreter made: the names in it and their order differ from version to version."""


def new_main(script: Script) -> ModuleType:
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


# Reading. It takes place in a forked process, so that nothing of it stays: neither `ast` nor what that imports.


def read_apart(script: Script, own: Own) -> tuple[list[Any], dict[str, str]]:
    """What to load, in order, and what is left to the children and why. A script that defeats the reader loads nothing.

    Raises `UnfitError` where there is no such module to run.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            with open(writing, "wb") as file:
                reader = Reader(own)
                unfit = reader.read_script(script)
                marshal.dump((reader.requests, reader.left, unfit), file)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    if not told:
        return [], {script.argv[-1]: "it could not be read"}
    requests, left, unfit = marshal.loads(told)  # noqa: S302  # from our own process
    if unfit is not None:
        raise UnfitError(unfit)
    return requests, left


class _StopError(Exception):
    """Reading has come to what may change how later imports go."""


class _MissingError(Exception):
    """An import that would fail: no such module."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HARMLESS_CALLS = _words(
    """
    abs all any bool bytes chr dict enumerate filter float format frozenset getattr hasattr id int isinstance
    issubclass len list map max min object ord print property range repr reversed round set slice sorted staticmethod
    classmethod str sum super tuple type zip
    abc.abstractmethod collections.Counter collections.OrderedDict collections.defaultdict collections.deque
    collections.namedtuple contextlib.asynccontextmanager contextlib.contextmanager contextvars.ContextVar
    dataclasses.dataclass dataclasses.field datetime.timedelta decimal.Decimal enum.Enum enum.auto enum.unique
    fractions.Fraction functools.cache functools.cached_property functools.lru_cache functools.partial
    functools.singledispatch functools.total_ordering functools.wraps itertools.count logging.getLogger
    os.environ.get os.getcwd os.getenv os.getpid os.path.abspath os.path.basename os.path.dirname os.path.exists
    os.path.expanduser os.path.isdir os.path.isfile os.path.join os.path.realpath pathlib.Path pathlib.PurePath
    re.compile threading.Event threading.Lock threading.RLock threading.local time.monotonic time.perf_counter
    time.time typing.NamedTuple typing.NewType typing.ParamSpec typing.TypeVar typing.TypedDict typing.final
    typing.overload typing.runtime_checkable uuid.uuid4
    """
)
"""None changes what a later import does."""

_HARMLESS_NAMES = HARMLESS_CALLS | {name.rpartition(".")[2] for name in HARMLESS_CALLS}
"""They are often imported by name."""

HARMLESS_METHODS = _words(
    """
    absolute as_posix copy count encode decode endswith exists format get index is_dir is_file items join joinpath
    keys lower lstrip resolve rsplit rstrip split splitlines startswith strip title upper values with_name with_suffix
    getter setter deleter
    """
)
"""Of whatever object."""

_KNOWN = _words("sys os version_info platform name maxsize implementation byteorder")
"""What a condition may look at to be decided by reading."""


class Reader:
    """Reads a script and the overlay's modules that it imports, in the order in which they would run."""

    def __init__(self, own: Own) -> None:
        import ast

        self.requests = []  # type: list[tuple[str, list[str]]]
        self.left = {}  # type: dict[str, str]
        self._ast = ast
        self._own = own
        self._begun = set()  # type: set[str]
        self._visitors = {
            ast.Import: self._import,
            ast.ImportFrom: self._import_from,
            ast.FunctionDef: self._function,
            ast.AsyncFunctionDef: self._function,
            ast.ClassDef: self._class,
            ast.Assign: self._assign,
            ast.AnnAssign: self._assign,
            ast.AugAssign: self._assign,
            ast.Expr: self._expression,
            ast.If: self._if,
            ast.Try: self._try,
            ast.Pass: self._nothing,
        }  # type: dict[type, Callable[[Any, Module], None]]
        for lazy in ("TypeAlias",):  # type X = ... of 3.12
            if hasattr(ast, lazy):
                self._visitors[getattr(ast, lazy)] = self._nothing

    def read_script(self, script: Script) -> str | None:
        """Read to the first statement that does something, then note what is imported after it.

        Returns why there is nothing to run, where that is so.
        """
        module, source = Module(MAIN, "", script.argv[0]), script.source
        if script.module is not None:
            try:
                spec = self._runnable(script.module)
            except _MissingError as missing:
                return str(missing)
            module = Module(MAIN, spec.parent or "", spec.origin or script.module)
        try:
            if script.module is not None:
                self._begin(module.package)
                source = _source(spec)
            tree = self._ast.parse(source)
        except (_StopError, _MissingError, OSError, SyntaxError, ValueError) as error:
            self.left[script.argv[-1]] = str(error)
        else:
            self._read_top(tree, module)
        return None

    def _runnable(self, name: str) -> ModuleSpec:
        """Of a module, or of what a package runs as (runpy)."""
        spec = self._find(name)
        return spec if spec.submodule_search_locations is None else self._find(name + ".__main__")

    def _read_top(self, tree: ast.Module, module: Module) -> None:
        rest = list(tree.body)
        try:
            while rest:
                self._statement(rest[0], module)
                del rest[0]
        except (_StopError, _MissingError) as stop:
            for node in (node for statement in rest for node in self._ast.walk(statement)):
                for name in _imported(node):
                    self.left.setdefault(name, str(stop))

    def _block(self, statements: Iterable[ast.stmt], module: Module) -> None:
        for statement in statements:
            self._statement(statement, module)

    def _statement(self, node: ast.stmt, module: Module) -> None:
        visit = self._visitors.get(type(node))
        if visit is None:
            raise self._stop(node, module)
        visit(node, module)

    def _stop(self, node: Any, module: Module) -> _StopError:
        return _StopError(
            "it stands behind line %d of %s, which may change what is loaded" % (node.lineno, module.path)
        )

    def _nothing(self, node: ast.stmt, module: Module) -> None:
        pass

    def _import(self, node: ast.Import, module: Module) -> None:
        for alias in node.names:
            self._want(alias.name, [], node, module)

    def _import_from(self, node: ast.ImportFrom, module: Module) -> None:
        name = node.module or ""
        if name == "__future__":
            return
        if node.level:
            base = module.package.split(".")
            if not module.package or node.level > len(base):
                raise self._stop(node, module)
            name = ".".join(base[: len(base) - node.level + 1] + ([name] if name else []))
        self._want(name, [alias.name for alias in node.names], node, module)

    def _want(self, name: str, names: list[str], node: ast.stmt, module: Module) -> None:
        """An import statement: what is installed is requested, what is the overlay's own is read."""
        top = name.partition(".")[0]
        if top in sys.modules or not self._own.has(self._find(top)):
            self.requests.append((name, names))
            return
        try:
            self._begin(name)
            for part in names:
                if self._is_there(name + "." + part):
                    self._begin(name + "." + part)
        except (OSError, SyntaxError, ValueError):
            raise self._stop(node, module) from None

    def _begin(self, name: str) -> None:
        """Read a module and the packages around it, as far as that was not done."""
        parts = name.split(".") if name else []
        for full in (".".join(parts[: at + 1]) for at in range(len(parts))):
            if full in self._begun:
                continue
            self._begun.add(full)
            spec = self._find(full)
            if not self._own.has(spec):
                self.requests.append((full, []))
            elif spec.has_location and spec.origin:
                self.left[full] = "it is the overlay's own, and runs anew for each call"
                self._block(self._ast.parse(_source(spec)).body, Module(full, spec.parent or "", spec.origin))

    def _find(self, name: str) -> ModuleSpec:
        """Of a module in a package without importing that. Raises `_MissingError`."""
        package, _, _ = name.rpartition(".")
        path = self._find(package).submodule_search_locations if package else None
        spec = None if package and path is None else find_spec(name, path)
        if spec is None:
            raise _MissingError("there is no module %s" % name)
        return spec

    def _is_there(self, name: str) -> bool:
        try:
            self._find(name)
        except _MissingError:
            return False
        return True

    def _function(self, node: ast.FunctionDef, module: Module) -> None:
        self._decorators(node, module)
        defaults = [default for default in node.args.defaults + node.args.kw_defaults if default is not None]
        self._check(defaults, node, module)

    def _class(self, node: ast.ClassDef, module: Module) -> None:
        self._decorators(node, module)
        self._check(node.bases + [keyword.value for keyword in node.keywords], node, module)
        self._block(node.body, module)

    def _decorators(self, node: Any, module: Module) -> None:
        for decorator in node.decorator_list:
            called = decorator if isinstance(decorator, self._ast.Call) else None
            name = _dotted(decorator)
            if called is None and name not in _HARMLESS_NAMES and name.rpartition(".")[2] not in HARMLESS_METHODS:
                raise self._stop(node, module)
            self._check([decorator], node, module)

    def _assign(self, node: Any, module: Module) -> None:
        targets = node.targets if isinstance(node, self._ast.Assign) else [node.target]
        plain = (self._ast.Name, self._ast.Tuple, self._ast.List, self._ast.Starred, self._ast.expr_context)
        if not all(isinstance(part, plain) for target in targets for part in self._ast.walk(target)):
            raise self._stop(node, module)
        self._check([node.value] if node.value is not None else [], node, module)

    def _expression(self, node: ast.Expr, module: Module) -> None:
        self._check([node.value], node, module)

    def _check(self, expressions: Iterable[ast.expr], node: ast.stmt, module: Module) -> None:
        if not all(self._is_harmless(expression) for expression in expressions):
            raise self._stop(node, module)

    def _is_harmless(self, node: ast.AST) -> bool:
        """Whether evaluating it cannot change what a later import does. A method of a `super()` counts as any other."""
        ast = self._ast
        if isinstance(node, ast.Lambda):
            return True
        if isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom)):
            return False
        if isinstance(node, ast.Call) and not self._is_harmless_call(node):
            return False
        return all(self._is_harmless(child) for child in ast.iter_child_nodes(node))

    def _is_harmless_call(self, node: ast.Call) -> bool:
        if _dotted(node.func) in _HARMLESS_NAMES:
            return True
        if isinstance(node.func, self._ast.Attribute) and node.func.attr in HARMLESS_METHODS:
            return True
        first = node.args[0] if node.args else None
        ignores = isinstance(first, self._ast.Constant) and first.value == "ignore"
        return ignores and _dotted(node.func) in ("warnings.filterwarnings", "warnings.simplefilter")

    def _if(self, node: ast.If, module: Module) -> None:
        truth = self._truth(node.test, module)
        if truth is not None:
            self._block(node.body if truth else node.orelse, module)
            return
        self._check([node.test], node, module)
        imports = (self._ast.Import, self._ast.ImportFrom)
        if any(isinstance(part, imports) for part in self._ast.walk(node)):
            raise self._stop(node, module)
        self._block(node.body + node.orelse, module)

    def _truth(self, test: ast.expr, module: Module) -> bool | None:
        """Of a condition about the interpreter or `__name__`; None where only running the script can tell."""
        ast = self._ast
        if _dotted(test).rpartition(".")[2] == "TYPE_CHECKING":
            return False
        for part in ast.walk(test):
            if isinstance(part, (ast.Call, ast.Lambda, ast.NamedExpr, ast.Await)):
                return None
            name = getattr(part, "id", getattr(part, "attr", None))
            if name is not None and name not in _KNOWN and name != "__name__":
                return None
        try:
            code = compile(ast.Expression(test), "<test>", "eval")
            return bool(eval(code, {"sys": sys, "os": os, "__name__": module.name}))  # noqa: S307
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return None

    def _try(self, node: ast.Try, module: Module) -> None:
        try:
            self._block(node.body, module)
        except _MissingError:
            handler = self._handler(node)
            if handler is None:
                raise
            self._block(handler, module)
        else:
            self._block(node.orelse, module)
        self._block(node.finalbody, module)

    def _handler(self, node: ast.Try) -> list[ast.stmt] | None:
        """The statements that a failed import leads to; None where it is not caught."""
        for handler in node.handlers:
            caught = [handler.type] if handler.type is not None else []
            names = {_dotted(part) for kind in caught for part in self._ast.walk(kind)}
            if not caught or names & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}:
                return list(handler.body)
        return None


class Module:
    """What is being read: its name, the package that relative imports start from, its file."""

    def __init__(self, name: str, package: str, path: str) -> None:
        self.name = name
        self.package = package
        self.path = path


def find_spec(name: str, path: Any) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(name, path) if find is not None else None
        if spec is not None:
            return spec  # type: ignore[no-any-return]
    return None


def _source(spec: ModuleSpec) -> bytes:
    """Raises ValueError where there is no source to read: an extension, a module without its source."""
    if not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError("%s has no source" % spec.name)
    with open(spec.origin, "rb") as file:
        return file.read()


def _dotted(node: Any) -> str:
    """`a.b.c` of a name, an attribute, or the function of a call; else empty."""
    if hasattr(node, "func"):
        return _dotted(node.func)
    if hasattr(node, "attr"):
        base = _dotted(node.value)
        return base and base + "." + node.attr
    return getattr(node, "id", "")


def _imported(node: Any) -> Iterator[str]:
    if hasattr(node, "module") and node.module and not node.level:
        yield node.module
    elif hasattr(node, "names") and all(hasattr(alias, "name") for alias in node.names) and not hasattr(node, "level"):
        for alias in node.names:
            yield alias.name


# Loading.

CHANCE = frozenset(
    [("random", "Random"), ("numpy.random.mtrand", "RandomState"), ("numpy.random._generator", "Generator")]
)
"""Sources of random numbers, which every child of one process would draw alike."""


RENEWED_CHANCE = (("random", "_inst"), ("numpy.random.mtrand", "_rand"))
"""Those that a child seeds anew."""


class Loader:
    """Imports modules, and watches what they do."""

    def __init__(self, program: Program, own: Own, skip: Iterable[str]) -> None:
        self._program = program
        self._skip = tuple(skip)
        self._guard = Guard(own)

    def load(self, requests: Iterable[tuple[str, list[str]]], preload: Iterable[str]) -> None:
        """The requests, each a module and the names wanted from it, then `preload`.

        A request that is left alone may change how the next ones go, so these are left alone, too.
        """
        with Capture() as said:
            blocker = None  # type: str | None
            with self._guard:
                for name, names in requests:
                    if blocker is not None:
                        self._leave(name, "it stands behind the import of %s" % blocker)
                    elif not self._load(name, names, said):
                        blocker = name
            for name in preload:
                self._load(name, [], said)

    def _leave(self, name: str, why: str) -> None:
        self._program.left.setdefault(name, why)

    def _load(self, name: str, names: list[str], said: Capture) -> bool:
        if any(name == skipped or name.startswith(skipped + ".") for skipped in self._skip):
            self._leave(name, "it does more than define things")
            return False
        before, held = World(said), len(sys.modules)
        try:
            why = self._import(name, names)
        except _MissingError as missing:
            self._leave(name, str(missing))
            return False
        if why or len(sys.modules) != held:
            faults = ([why] if why else []) + self._guard.told() + World(said).changes_since(before)
            if faults:
                self._program.unclean[name] = " and ".join(faults)
                return False
        self._program.left.pop(name, None)
        if name not in self._program.loaded:
            self._program.loaded.append(name)
        return True

    @staticmethod
    def _import(name: str, names: list[str]) -> str | None:
        """What went wrong. Raises `_MissingError` where there is no such module."""
        try:
            __import__(name, {}, None, names)
        except BaseException as error:  # noqa: BLE001  # also SystemExit: whatever it is, it is to happen in the child
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and (name == missing or name.startswith(missing + ".")):
                raise _MissingError("there is no module %s" % missing) from None
            return "it does not load: %s: %s" % (type(error).__name__, error)
        return None


class Guard:
    """While it stands, nothing that is imported gets at the overlay's own code (a module that shadows another)."""

    def __init__(self, own: Own) -> None:
        self._own = own
        self._found = []  # type: list[str]
        self._finder = None  # type: Any

    def __enter__(self) -> None:
        at = [getattr(finder, "__name__", "") for finder in sys.meta_path].index("PathFinder")
        self._finder = sys.meta_path[at]
        sys.meta_path.insert(at, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = self._finder.find_spec(name, path, target)  # type: ModuleSpec | None
        if spec is not None and self._own.has(spec):
            self._found.append(name)
            raise ImportError("the overlay's own code runs in the children only", name=name)
        return spec

    def told(self) -> list[str]:
        """What was asked for since the last time, in words."""
        found, self._found = self._found, []
        return ["it loads %s, which is the overlay's own" % name for name in found]


_OF_LIBC = 0b11 << 31
"""Signals 32 and 33, which the C library handles once there was a thread (nptl(7))."""


class World:
    """What this process would not hand on to a child as it is, and what is outside of it."""

    def __init__(self, said: Capture) -> None:
        status = _status()
        with open("/proc/self/stat", "rb") as file:
            figures = file.read().rpartition(b")")[2].split()
        self._facts = {
            "it writes to stdout or stderr": said.size,
            "it starts threads": status["Threads"],
            "it starts a process": figures[8],  # cminflt of proc(5): page faults of children that were waited for
            "it leaves something open": _open_files(),
            "it changes how signals are handled": [
                int(status[name], 16) & ~_OF_LIBC for name in ("SigBlk", "SigIgn", "SigCgt")
            ],
            "it sets a timer": [_signal.getitimer(which) for which in range(3)],
            "it changes the umask": status.get("Umask"),
            "it changes the user": [status[name] for name in ("Uid", "Gid")],
            "it changes the environment": dict(os.environ),
            "it changes the working folder": os.getcwd(),
            "it makes a source of random numbers": _sources_of_chance(),
        }  # type: dict[str, Any]

    def changes_since(self, before: World) -> list[str]:
        changes = [what for what, fact in self._facts.items() if fact != before._facts[what]]
        threads = "it starts threads"
        if threads in changes and _end_at_fork(before._facts[threads]):
            changes.remove(threads)
        return changes


def _status() -> dict[str, str]:
    """/proc/self/status (proc(5))."""
    with open("/proc/self/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def _open_files() -> dict[str, str]:
    files = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            files[fd] = os.readlink("/proc/self/fd/" + fd)
        except FileNotFoundError:  # the listing's own
            pass
    return files


def _end_at_fork(threads: str) -> bool:
    """Whether a fork ends the threads that were started: OpenBLAS, for one, puts its pool away and starts it at need.

    A thread that was joined may be counted for a moment longer.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for _ in range(100):
        if _status()["Threads"] == threads:
            return True
        os.sched_yield()
    return False


def _sources_of_chance() -> int:
    """How many there are that a child does not seed anew."""
    known = [vars(sys.modules[name]).get(source) for name, source in RENEWED_CHANCE if name in sys.modules]
    kinds = tuple(kind for name, source in CHANCE if (kind := getattr(sys.modules.get(name), source, None)) is not None)
    system = getattr(sys.modules.get("random"), "SystemRandom", ())
    found = [thing for thing in gc.get_objects() if isinstance(thing, kinds) and not isinstance(thing, system)]
    return sum(not any(thing is seeded for seeded in known) for thing in found)


# Running, in a forked child.


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
    """Takes a child down to the bottom of its stack."""


class Program:
    """A script with its imports loaded.

    `loaded`: the modules that the children find there. `left`: the modules that are left to them, and why. `unclean`:
    modules that did more than define things, and what that was; if there is one, this process is not to be used.
    """

    def __init__(self, script: Script) -> None:
        self.loaded = []  # type: list[str]
        self.left = {}  # type: dict[str, str]
        self.unclean = {}  # type: dict[str, str]
        self._script = script
        self._options = list(getattr(sys, "orig_argv", ()))[: -len(sys.argv)]
        self._environ = os.environ

    def settle(self) -> None:
        """Nothing more will be loaded. The collector of a child is not to look through it: that would copy it."""
        if self._script.module is not None:
            from runpy import _run_module_as_main  # type: ignore[attr-defined]

            self._run_module = _run_module_as_main
        self._renew = [renew for name, renew in RENEWALS if name in sys.modules]
        self._end = End()
        gc.collect()
        gc.freeze()

    def run(self, arguments: list[str], env: dict[str, str]) -> NoReturn:
        """Be a new interpreter that runs the script, to its end. Only in a forked child, and never returns.

        `arguments` is as for `prepare`, with what this call adds; `env` is added to the environment.
        """
        for name, value in env.items():
            self._environ[name] = value
        script = self._script
        self._end.forget_new_modules()
        sys.argv = list(arguments) if script.module is None else ["-m"] + arguments[2:]
        if self._options:
            sys.orig_argv = self._options + arguments
        _restore_signals()
        for renew in self._renew:
            renew()
        if MAIN not in sys.modules:
            sys.modules[MAIN] = new_main(script)
        sys.excepthook = self._begin
        raise _Unwind

    @_unseen
    def _begin(self, _kind: type, _unwind: BaseException, _traceback: TracebackType) -> None:
        """Called by the interpreter, on an empty stack."""
        sys.excepthook = sys.__excepthook__
        _forget_last_exception()
        status = 0
        try:
            if self._script.module is not None:
                self._run_module(self._script.module)
            else:
                exec(self._script.code or self._script.compile(), vars(sys.modules[MAIN]))  # noqa: S102
        except BaseException as error:  # noqa: BLE001  # the outermost of the script
            status = _failed(error)
        self._end(status)


INTERRUPTED = -2
"""Not an exit status: the process ends itself by SIGINT, so that who waits for it knows."""


def _failed(error: BaseException) -> int:
    """What the interpreter does with what a script raised. Returns the exit status."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
    status = report(error)
    return INTERRUPTED if type(error) is KeyboardInterrupt else status


_STREAMS = ("stderr", "stdout")


def _flush_quietly() -> None:
    for name in _STREAMS:
        try:
            getattr(sys, name).flush()
        except Exception:  # noqa: BLE001  # a stream may be anything, or None; what is wrong is told at the end
            pass


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


# The end of a process, as Python/pythonrun.c and Python/pylifecycle.c have it.


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

    def forget_new_modules(self) -> None:
        """Of what the launcher has imported since (`os.wait4` wants `resource`) the script is to know nothing."""
        self._forgotten += [sys.modules.pop(name) for name in list(self._new_modules())]

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
        if any(_is_finalized(kind) for kind in set(map(type, objects()))):
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
    for name in reversed(_STREAMS):
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
    """`fflush`; None without `ctypes`. Nothing of what it takes stays among the modules."""
    held = set(sys.modules)
    try:
        import ctypes
    except ImportError:
        return None
    for name in set(sys.modules) - held:
        del sys.modules[name]
    return ctypes.PyDLL(None).fflush
