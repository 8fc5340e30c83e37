"""The house rules that a reader relies on: who imports whom, how long a function gets, and tests that can fail."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from typing import TYPE_CHECKING

import pytest

import bus
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# From low to high. A module imports only what stands on a lower floor; runners.base stands below all.
FLOORS = [
    ["resources", "merkle", "own_files"],
    ["unsynced"],
    ["errors", "memory", "stress_sources", "recent"],
    ["stress", "runes", "canonical", "redaction", "events", "notes"],
    ["model"],
    ["settings", "hookspecs", "schemas", "purges"],
    ["codehash", "drift", "filesync", "manifest_form", "metrics", "overlay_entry", "records"],
    ["members", "losses", "index_file"],
    ["segments"],
    ["index_view"],
    ["index"],
    ["manifests", "overlay_files", "overlay_packages", "overlay_programs", "profiles", "provenance"],
    ["overlays", "policy", "claims", "degradation", "private_file", "upkeep"],
    ["signed"],
    ["notary"],
    ["checkpoints", "ledger_key"],
    ["admission", "needs", "tails", "verification", "serving", "envelopes", "tokens", "secrets"],
    ["groups"],
    ["chain"],
    ["ledger", "guard", "openapi", "proofs", "protocol", "server_lock", "web"],
    ["scheduler", "course", "callers", "targets", "plugins", "profiling"],
    ["balance", "starts"],
    ["dispatch"],
    ["app_ledger", "replay"],
    ["app", "local", "remote", "gate"],
    ["console", "templates", "doctor", "serve", "stress_watch", "plot"],
    ["cli_ledger"],
    ["cli_overlays", "cli_profile", "cli_proofs", "cli_replay", "cli_callers", "cli_runes", "cli_stress"],
    ["cli"],
]
FLOOR = {f"bus.{name}": floor for floor, names in enumerate(FLOORS, 1) for name in names} | {"bus": 8}
MODULES = sorted((REPO / "bus").rglob("*.py"))
RUNNERS = sorted((REPO / "runners").rglob("*.py"))
# The programs that run as a helper import nothing of ours but each other, by their bare names; nobody imports them.
PROGRAMS = ["launch", "inside", "launcher", "channel", "execution", "sandbox", "containment", "descendants", "zygote"]
PROGRAMS += ["watching", "zygote_script", "zygote_reading", "zygote_loading", "zygote_ending"]
RUNNER_FLOORS = [
    ["base", "launch", "inside", "launcher", "channel", "execution"],
    ["sandbox", "scratch", "containment", "descendants", "watching", "zygote"],
    ["alarm", "bpf", "syscalls", "kernel", "programs", "probe_rights", "tiers"],
    ["zygote_script", "zygote_reading", "zygote_loading", "zygote_ending"],
    ["output", "logs", "ports", "breaker", "http_client", "python_command", "strays", "seccomp"],
    ["exits", "sealed_file", "helper_errors", "cgroups"],
    ["wire", "probe", "contained", "purges", "faults", "scratch_root", "places", "worker_pipes"],
    ["processes"],
    ["helper"],
    ["helpers", "confinement"],
    ["unstarted"],
    ["worker", "service"],
    ["worker_pool", "services"],
    ["workers"],
    ["process", "http"],
    ["trial"],
]
RUNNER_FLOOR = {f"runners.{name}": floor for floor, names in enumerate(RUNNER_FLOORS, 1) for name in names}
OVERLAY = REPO / "overlays/aos_context/aos_context"
OF_OVERLAY = sorted(OVERLAY.rglob("*.py"))
TESTS = sorted([*(REPO / "tests").glob("test_*.py"), *(REPO / "tests/context").glob("test_*.py")])
DOCTORS = {"runners.cgroups", "runners.confinement", "runners.helpers", "runners.tiers", "runners.trial"}
LONGEST_FUNCTION = 60
PACKAGES = {"bus", "runners"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(file: Path, *, of_types: bool = False) -> frozenset[str]:
    """The modules of ours that a file imports when it runs, wherever in it; with `of_types` those for types as well."""
    nodes = list(statements(ast.parse(file.read_text()), of_types=of_types))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_ = {
        full if is_module(full := f"{node.module}.{alias.name}") else str(node.module)
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return frozenset(name for name in plain | from_ if name.partition(".")[0] in PACKAGES)


def statements(node: ast.AST, *, of_types: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not of_types:
            continue
        yield child
        yield from statements(child, of_types=of_types)


def is_module(name: str) -> bool:
    path = REPO.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_module_stands_on_the_map() -> None:
    named = set(re.findall(r"\w+", bus.__doc__ or ""))
    assert {file.stem for file in (REPO / "bus").glob("*.py")} - {"__init__"} - named == set()


def test_every_module_has_its_floor() -> None:
    assert {name_of(file) for file in MODULES} - set(FLOOR) == set()


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_a_module_of_the_bus_imports_only_what_stands_below_it(file: Path) -> None:
    own = FLOOR[name_of(file)]
    above = {name for name in imports(file) if name.startswith("bus") and FLOOR[name] >= own and name != "bus"}
    assert above == set()


@pytest.mark.parametrize("file", RUNNERS, ids=name_of)
def test_runners_know_nothing_of_the_bus_not_even_for_types(file: Path) -> None:
    assert {name for name in imports(file, of_types=True) if not name.startswith("runners")} == set()


@pytest.mark.parametrize("file", [file for file in RUNNERS if file.stem != "__init__"], ids=name_of)
def test_a_module_of_the_runners_imports_only_what_stands_below_it(file: Path) -> None:
    own = RUNNER_FLOOR[name_of(file)]
    above = {name for name in imports(file) if RUNNER_FLOOR[name] >= own}
    assert above | (imports(file) & {f"runners.{name}" for name in PROGRAMS}) == set()


def test_the_ground_floor_imports_nothing_of_ours() -> None:
    assert imports(REPO / "runners/base.py", of_types=True) == set()


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_the_bus_knows_of_the_runners_the_ground_floor_only(file: Path) -> None:
    """Of the runners the bus knows the ground floor, and the plugins that register them know them."""
    allowed = {"runners", "runners.base"} | (
        {
            f"runners.{name}"
            for name in (
                "cgroups",
                "confinement",
                "helpers",
                "http",
                "logs",
                "process",
                "python_command",
                "scratch_root",
                "services",
                "tiers",
            )
        }
        if name_of(file) == "bus.plugins"
        else {
            "bus.cli_overlays": {"runners.logs"},
            "bus.doctor": DOCTORS,
            "bus.memory": {"runners.cgroups"},  # which of our cgroups has calls, and which has the bus alone
            "bus.manifests": {"runners.programs"},  # how a link is followed is to be the same for both
        }.get(name_of(file), set())
    )
    assert {name for name in imports(file) if name.startswith("runners")} <= allowed


@pytest.mark.parametrize(
    "file", sorted((REPO / "overlays").rglob("*.py")), ids=lambda file: str(file.relative_to(REPO))
)
def test_overlays_stand_on_the_standard_library_and_what_they_require(file: Path) -> None:
    folder = REPO / "overlays" / file.relative_to(REPO / "overlays").parts[0]
    nodes = list(ast.walk(ast.parse(file.read_text())))
    roots = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots |= {
        str(node.module).partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    }
    siblings = {path.stem for path in [*file.parent.glob("*.py"), *folder.iterdir()]}
    assert roots - sys.stdlib_module_names - siblings - required(folder / "requirements.txt") == set()


def required(file: Path) -> set[str]:
    """The modules of the distributions that a requirements file names, optional ones in its comments, too."""
    text = file.read_text() if file.exists() else ""
    names = re.findall(r"^(?:# optional: )?([A-Za-z0-9_-]+)[>=]", text, re.MULTILINE)
    return {{"mem0ai": "mem0"}.get(name, name.replace("-", "_")) for name in names}


def test_what_the_context_overlay_needs_and_may_use_are_extras_of_the_bus() -> None:
    text = (OVERLAY.parent / "requirements.txt").read_text()
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.findall(r"^# optional: (.+)", text, re.MULTILINE) == extras["tokens"] + extras["mem0"]
    assert set(extras["context"]) <= set(text.splitlines())
    readme = (OVERLAY.parent / "README.md").read_text()
    assert all(f"pip install '{one}'" in readme for one in extras["tokens"] + extras["mem0"])


def test_a_module_of_the_context_overlay_imports_only_what_stands_before_it_on_the_map() -> None:
    """Those of `api` stand together, where the map has `api`."""
    text = ast.get_docstring(ast.parse((OVERLAY / "__init__.py").read_text())) or ""
    order = re.findall(r"`(\w+)`", text.partition("Reading order")[2])
    place = {name: number for number, name in enumerate(order)}
    assert {file.relative_to(OVERLAY).parts[0].removesuffix(".py") for file in OF_OVERLAY} - {"__init__"} == set(order)
    for file in OF_OVERLAY:
        own = file.relative_to(OVERLAY).parts[0].removesuffix(".py")
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        named = [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]
        needs = {name.split(".")[1] for name in named if name.startswith("aos_context.")} - {own}
        assert {name for name in needs if place[name] >= place[own]} == set(), file


def test_a_public_name_of_the_context_overlay_is_given_once() -> None:
    """One word means one thing: who meets a name in two modules may take it for the same."""
    given: dict[str, list[str]] = {}
    for file in OF_OVERLAY:
        for name in public_names(ast.parse(file.read_text())):
            given.setdefault(name, []).append(str(file.relative_to(OVERLAY)))
    assert {name: files for name, files in given.items() if len(files) > 1} == {}


def test_a_module_of_the_context_overlay_has_one_store_at_most_beside_protocols() -> None:
    stores = {
        str(file.relative_to(OVERLAY)): [
            node.name
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("Store") and "Protocol" not in bases(node)
        ]
        for file in OF_OVERLAY
    }
    assert {file: names for file, names in stores.items() if len(names) > 1} == {}


def bases(node: ast.ClassDef) -> set[str]:
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def public_names(module: ast.Module) -> Iterator[str]:
    """Of classes, functions and constants that a module defines."""
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        else:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names = [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def test_nothing_imports_in_a_circle() -> None:
    graph = {name_of(file): imports(file) for file in [*MODULES, *RUNNERS]}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys() - {name}]:
        for leaf in leaves:
            del graph[leaf]
    assert graph == {}


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("file", [*MODULES, *RUNNERS, *OF_OVERLAY], ids=name_of)
def test_no_function_is_too_long_to_read(file: Path) -> None:
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions(file)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("file", TESTS, ids=name_of)
def test_every_test_can_fail(file: Path) -> None:
    """A test asserts, expects an exception, or calls something that does: then it has at least one call."""
    tests = [function for function in functions(file) if function.name.startswith("test_")]
    assert tests, "a test file without a test"
    for test in tests:
        asserted = [node.test for node in ast.walk(test) if isinstance(node, ast.Assert)]
        assert not any(isinstance(condition, ast.Constant) for condition in asserted), test.name
        assert asserted or any(isinstance(node, ast.Call) for node in ast.walk(test)), test.name


@pytest.mark.parametrize("file", TESTS, ids=name_of)
def test_no_test_hides_another_of_the_same_name(file: Path) -> None:
    names = [function.name for function in functions(file) if function.name.startswith("test_")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", [*MODULES, *RUNNERS, *OF_OVERLAY], ids=name_of)
def test_a_module_opens_with_its_job(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))
