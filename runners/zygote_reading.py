"""Which modules a script will import before it does anything: found by reading it, from the top, as it would run.

Reading takes place in a forked process, so that nothing of it stays: neither `ast` nor what that imports.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Iterable, Iterator
    from importlib.machinery import ModuleSpec
    from typing import Any

    from runners.zygote_script import MAIN, Main, MissingError, Own, UnfitError
else:
    from zygote_script import MAIN, MissingError, UnfitError


def read_apart(script: Main, own: Own) -> tuple[list[Any], dict[str, str]]:
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
        self._visitors: dict[type, Callable[[Any, Module], None]] = {
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
        }
        if hasattr(ast, "TypeAlias"):  # type X = ... of 3.12
            self._visitors[ast.TypeAlias] = self._nothing

    def read_script(self, script: Main) -> str | None:
        """Read to the first statement that does something, then note what is imported after it.

        Returns why there is nothing to run, where that is so.
        """
        module, source = Module(MAIN, "", script.argv[0]), script.source
        if script.module is not None:
            try:
                spec = self._runnable(script.module)
            except MissingError as missing:
                return str(missing)
            module = Module(MAIN, spec.parent or "", spec.origin or script.module)
        try:
            if script.module is not None:
                self._begin(module.package)
                source = _source(spec)
            tree = self._ast.parse(source)
        except (_StopError, MissingError, OSError, SyntaxError, ValueError) as error:
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
        except (_StopError, MissingError) as stop:
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
        """Of a module in a package without importing that. Raises `MissingError`."""
        package, _, _ = name.rpartition(".")
        path = self._find(package).submodule_search_locations if package else None
        spec = None if package and path is None else find_spec(name, path)
        if spec is None:
            raise MissingError("there is no module %s" % name)
        return spec

    def _is_there(self, name: str) -> bool:
        try:
            self._find(name)
        except MissingError:
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
        except MissingError:
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
