"""Manifests: three shapes become one form, and every fault is found at once."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from bus import manifest_form, manifests, resources, runes
from bus.canonical import LARGEST_INTEGER, canonical
from bus.manifests import ManifestError
from bus.model import Degradation, Manifest, Permission, Phase, Service
from runners.base import Workers
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOUR_PHASES = (Phase.OPEN, Phase.ALIGN, Phase.CLEAR, Phase.SEAL)


def shape_a(**changes: Any) -> dict[str, Any]:
    return {
        "name": "abraxas",
        "version": "1.0.0",
        "status": "active",
        "phases": ["OPEN", "ASCEND"],
        "capabilities": ["analysis", "exec"],
        "entrypoint": "python3 'src/my run.py' --fast",
        "timeout_ms": 2500,
        "op_policy": {"hash": ["analysis"], "wc": ["analysis", "exec"]},
        "runtime_type": "process",
    } | changes


def shape_b(**changes: Any) -> dict[str, Any]:
    return {
        "name": "psyfi",
        "version": "0.1.0",
        "description": "Simulates.",
        "entrypoints": {
            "http": {"base_url": "http://127.0.0.1:8787/api/"},
            "proc": {"command": ["python", "-m", "cli"]},
        },
        "capabilities": {
            "psyfi.simulate": {
                "runner": "http",
                "path": "/run",
                "method": "POST",
                "timeout_s": 60,
                "default_profile": "BALANCED",
                "degradation": {"max_fraction": 0.7, "disable_nonessential": True},
            },
            "ping": {"runner": "proc", "path": "ping"},
            "bare": {"runner": "proc"},
        },
        "resources": {"prefers_gpu": True, "notes": "none"},
        "policy": {"deterministic": True},
    } | changes


def native(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tool",
        "version": "2",
        "phases": ["OPEN", "CLEAR", "OPEN"],
        "permissions": ["exec"],
        "entrypoints": {"proc": {"command": ["./tool"], "mode": "spawn", "stdin": "pipe"}},
        "capabilities": {
            "count": {
                "runner": "proc",
                "description": "Counts.",
                "phases": ["CLEAR"],
                "memory": "MEM[SOFT=10,HARD=20,VOL=LOW]",
                "input_schema": {"properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}},
                "output_schema": {"type": "integer"},
                "concurrency": 2,
                "cost_cents": 0.5,
                "idempotent": True,
                "rights": {"read": ["data", "/etc/hosts"], "write": ["../out"], "network": [443, 8080]},
            }
        },
        "env": ["LANG"],
        "secrets": ["API_KEY"],
    } | changes  # fmt: skip


PLAIN = {"count": {"runner": "proc"}}


def put(root: Path, document: object, name: str | None = None) -> Path:
    named = document.get("name") if isinstance(document, dict) else None
    folder = root / (name or str(named))
    folder.mkdir(exist_ok=True)
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    (folder / "manifest.json").write_bytes(text)
    return folder


def faults_of(root: Path, document: object, name: str | None = None) -> dict[str, str]:
    """Each fault's path and its text."""
    with pytest.raises(ManifestError) as caught:
        manifests.read(put(root, document, name))
    assert caught.value.code == "ERR_OVERLAY_BROKEN"
    return {fault.path: str(fault) for fault in caught.value.faults}


def read(root: Path, document: dict[str, Any]) -> Manifest:
    return manifests.read(put(root, document))


def test_the_shipped_schema_is_valid_and_tells_the_three_shapes_apart() -> None:
    schema = resources.load_json("schemas/manifest.schema.json")
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert all(validator.is_valid(document) for document in (shape_a(), shape_b(), native()))
    assert not validator.is_valid(shape_b(capabilities={"ping": {"runner": "proc", "memory": "MINIMAL", "pth": "x"}}))


def test_every_key_in_the_schema_has_a_description() -> None:
    definitions: Any = resources.load_json("schemas/manifest.schema.json")["$defs"]

    def undescribed(schema: Any, path: str) -> list[str]:
        found = []
        for key, value in schema.get("properties", {}).items():
            named = definitions[value["$ref"].split("/")[2]] if "$ref" in value else value
            if "properties" not in value and "/properties/" not in value.get("$ref", "") and path.count("has_") == 0:
                found += [] if "description" in value or "description" in named else [f"{path}.{key}"]
            found += undescribed(value, f"{path}.{key}")
        return found

    shapes = (
        "shape_a", "shape_b", "native", "capability_b", "capability_native", "http_native", "proc_native", "resources",
        "policy",
    )  # fmt: skip
    assert [missing for shape in shapes for missing in undescribed(definitions[shape], shape)] == []


def test_the_defaults_that_the_schema_tells_are_those_of_the_code() -> None:
    definitions: Any = resources.load_json("schemas/manifest.schema.json")["$defs"]
    proc = definitions["proc_native"]["properties"]
    told = {Manifest: proc, Workers: proc["workers"]["properties"], Service: definitions["http_native"]["properties"]}
    for kind, properties in told.items():
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        schemas = {key: schema["default"] for key, schema in properties.items() if "default" in schema}
        assert len(schemas) > 1
        assert schemas == {key: defaults[key] for key in schemas}


def test_the_shape_that_is_read_is_the_one_that_the_schema_tells() -> None:
    definitions = resources.load_json("schemas/manifest.schema.json")["$defs"]
    is_native = Draft202012Validator({"$ref": "#/$defs/is_native", "$defs": definitions})
    plain = shape_b(entrypoints={"proc": {"command": ["cat"]}}, capabilities=PLAIN)
    changes: list[dict[str, Any]] = [{}, {"env": []}, {"capabilities": {"x": {"runner": "proc"}, "y": {"rights": {}}}}]
    keys = ("phases", "input_schema", "output_schema", "memory", "concurrency", "cost_cents", "idempotent", "x")
    changes += [{"capabilities": {"x": {"runner": "proc"}, "y": {"runner": "proc", key: 1}}} for key in keys]
    ways = ("mode", "stdin", "preload", "workers", "command", "ready_path", "start_timeout_s", "idle_s", "max_mb", "x")
    changes += [{"entrypoints": {kind: {"purge_path": 1}}} for kind in ("proc", "http")]
    changes += [{"entrypoints": {kind: {key: 1}}} for kind in ("proc", "http") for key in ways]
    for document in (plain | change for change in changes):
        assert (manifest_form.examine(document).shape == "native") == is_native.is_valid(document)


def test_shape_a_becomes_one_capability_called_run(tmp_path: Path) -> None:
    manifest = read(tmp_path, shape_a())
    run = manifest.capabilities["run"]
    assert manifest.shape == "A"
    assert list(manifest.capabilities) == ["run"]
    assert run.argv == ("python3", "src/my run.py", "--fast")
    assert (run.runner, run.timeout_s, run.phases) == ("proc", 2.5, (Phase.OPEN, Phase.ASCEND))
    assert manifest.permissions == {Permission.ANALYSIS, Permission.EXEC}
    assert manifest.op_policy == {"hash": ("analysis",), "wc": ("analysis", "exec")}
    assert manifest.folder == (tmp_path / "abraxas").resolve()
    assert len(manifest.manifest_hash) == 64


def test_shape_a_has_defaults_for_what_it_leaves_out(tmp_path: Path) -> None:
    folder = put(tmp_path, {"name": "small", "version": "1", "entrypoint": "./run"})
    manifest = manifests.read(folder, default_timeout_s=7.0)
    assert manifest.permissions == {Permission.ANALYSIS}
    assert manifest.phases == FOUR_PHASES
    assert manifest.capabilities["run"].timeout_s == 7.0
    assert manifest.capabilities["run"].memory.name == "MINIMAL"
    assert (manifest.op_policy, manifest.warnings) == (None, ())


def test_keys_of_older_buses_are_tolerated_and_others_are_warnings(tmp_path: Path) -> None:
    manifest = read(tmp_path, shape_a(schema_version=1, runes=["x"], py_exports={}, overlay="abraxas", tineout_ms=5))
    assert len(manifest.warnings) == 1
    assert "$.tineout_ms" in manifest.warnings[0]
    assert "timeout_ms" in manifest.warnings[0]


def test_shape_b_has_http_and_process_capabilities(tmp_path: Path) -> None:
    manifest = read(tmp_path, shape_b())
    simulate, ping, bare = manifest.capabilities.values()
    assert list(manifest.capabilities) == ["simulate", "ping", "bare"]
    assert (simulate.url, simulate.method, simulate.timeout_s) == ("http://127.0.0.1:8787/api/run", "POST", 60)
    assert simulate.memory.name == "BALANCED"
    assert simulate.degradation == Degradation(max_fraction=0.7, disable_nonessential=True)
    assert ping.argv == ("python", "-m", "cli", "ping", "--stdin-json")
    assert bare.argv == ("python", "-m", "cli", "--stdin-json")
    assert manifest.permissions == {Permission.ANALYSIS}
    assert (manifest.phases, manifest.shape) == (FOUR_PHASES, "B")
    assert manifest.deterministic
    assert manifest.resources == {"prefers_gpu": True, "notes": "none"}


def test_the_native_shape_is_read_whole(tmp_path: Path) -> None:
    manifest = read(tmp_path, native())
    count = manifest.capabilities["count"]
    folder = (tmp_path / "tool").resolve()
    assert (manifest.shape, manifest.mode, manifest.stdin) == ("native", "spawn", "pipe")
    assert manifest.phases == (Phase.OPEN, Phase.CLEAR)
    assert manifest.permissions == {Permission.EXEC}
    assert (manifest.env, manifest.secrets) == (("LANG",), ("API_KEY",))
    assert (count.phases, count.concurrency, count.cost_cents, count.idempotent) == ((Phase.CLEAR,), 2, 0.5, True)
    assert (count.memory.soft_mb, count.memory.hard_mb) == (10, 20)
    assert count.read_paths == (f"{folder}/data", "/etc/hosts")
    assert count.write_paths == (f"{folder.parent}/out",)
    assert count.network == (443, 8080)
    assert count.input_schema is not None
    assert count.output_schema == {"type": "integer"}


def test_an_unknown_nested_key_is_a_warning_in_b_and_a_fault_in_native(tmp_path: Path) -> None:
    capability = {"runner": "proc", "pth": "x"}
    manifest = read(tmp_path, shape_b(capabilities={"ping": capability}))
    assert "$.capabilities.ping.pth" in manifest.warnings[0]
    faults = faults_of(tmp_path, shape_b(phases=["OPEN"], capabilities={"ping": capability}))
    assert list(faults) == ["$.capabilities.ping.pth"]
    assert "'path'" in faults["$.capabilities.ping.pth"]


def test_an_unknown_top_level_key_is_a_warning_in_every_shape(tmp_path: Path) -> None:
    for document in (shape_a(extra=1), shape_b(extra=1), native(extra=1, secrets=[], capabilities=PLAIN)):
        assert ["$.extra" in warning for warning in read(tmp_path, document).warnings] == [True]


def test_rights_of_a_service_that_the_bus_does_not_start_are_a_warning(tmp_path: Path) -> None:
    http = {"base_url": "http://127.0.0.1:9"}
    capabilities = {"ask": {"runner": "http", "rights": {"network": False}}, "tell": {"runner": "http"}}
    foreign = native(entrypoints={"http": http}, capabilities=capabilities)
    assert read(tmp_path, foreign).warnings == (
        "$.capabilities.ask.rights cannot be held: the service is not a process of the bus",
    )
    own = native(entrypoints={"http": {"command": ["python3", "serve.py"]}}, capabilities=capabilities)
    assert read(tmp_path, own).warnings == ()


@pytest.mark.parametrize("right", ["read", "write"])
def test_no_right_goes_by_a_link_that_a_call_may_have_laid(tmp_path: Path, right: str) -> None:
    for name in ("tool", "own", "secret"):
        (tmp_path / name).mkdir()
    (tmp_path / "own/x").symlink_to(tmp_path / "secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")

    def rights_to(path: Path) -> dict[str, Any]:
        one = {"runner": "proc", "rights": {right: [str(path)]}}
        return native(
            capabilities={"one": one, "two": {"runner": "proc", "rights": {"write": [str(tmp_path / "own")]}}}
        )

    read(tmp_path, rights_to(tmp_path / "link"))
    assert list(faults_of(tmp_path, rights_to(tmp_path / "own/x"))) == [f"$.capabilities.one.rights.{right}[0]"]


def test_a_path_of_the_rights_is_where_it_leads_and_may_not_lead_out_of_the_folder_unseen(tmp_path: Path) -> None:
    folder = tmp_path / "tool"
    (folder / "data").mkdir(parents=True)
    (folder / "inside").symlink_to("data")
    (folder / "outside").symlink_to("/etc")
    (tmp_path / "link").symlink_to("/etc")

    def rights(*paths: str) -> dict[str, Any]:
        return {"capabilities": {"count": {"runner": "proc", "rights": {"read": list(paths)}}}}

    sound = read(tmp_path, native(**rights("inside", str(tmp_path / "link"))))
    assert sound.capabilities["count"].read_paths == (f"{folder.resolve()}/data", "/etc")
    faults = faults_of(tmp_path, native(**rights("data", "outside/passwd")))
    assert list(faults) == ["$.capabilities.count.rights.read[1]"]
    assert "a link to '/etc/passwd'" in faults["$.capabilities.count.rights.read[1]"]


@pytest.mark.parametrize("path", ["/proc", "/proc/1/root/etc", "/sys/../proc/self", "/sys/kernel", "/dev/fd"])
def test_no_right_is_to_what_the_kernel_shows_each_process_in_its_own_way(tmp_path: Path, path: str) -> None:
    for right in ("read", "write"):
        capabilities = {"count": {"runner": "proc", "rights": {right: [path]}}}
        faults = faults_of(tmp_path, native(capabilities=capabilities))
        assert list(faults) == [f"$.capabilities.count.rights.{right}[0]"]
        assert "/proc and /sys" in faults[f"$.capabilities.count.rights.{right}[0]"]
    beside = native(capabilities={"count": {"runner": "proc", "rights": {"read": ["/system", "/procs"]}}})
    assert read(tmp_path, beside).capabilities["count"].read_paths == ("/system", "/procs")


def test_no_right_is_to_write_the_manifest_that_the_rights_stand_in(tmp_path: Path) -> None:
    (tmp_path / "tool/out").mkdir(parents=True)

    def asking(right: str, path: str) -> dict[str, Any]:
        return native(capabilities={"count": {"runner": "proc", "rights": {right: [path]}}})

    for path in (".", "manifest.json", str(tmp_path / "tool"), str(tmp_path), "/"):
        faults = faults_of(tmp_path, asking("write", path))
        assert list(faults) == ["$.capabilities.count.rights.write[0]"], path
        assert "a path that has not the manifest in it" in faults["$.capabilities.count.rights.write[0]"]
        read(tmp_path, asking("read", path))
    read(tmp_path, asking("write", "out"))
    (tmp_path / "real.json").write_text(json.dumps(asking("write", "../real.json")))
    (tmp_path / "tool/manifest.json").unlink()
    (tmp_path / "tool/manifest.json").symlink_to("../real.json")
    for path in (".", "../real.json"):
        (tmp_path / "real.json").write_text(json.dumps(asking("write", path)))
        with pytest.raises(ManifestError, match="a path that has not the manifest in it"):
            manifests.read(tmp_path / "tool")


def test_a_path_of_the_rights_that_cannot_be_followed_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path.resolve() / "link"
    link.symlink_to("/etc")

    def readlink(path: str, readlink: Callable[[str], str] = os.readlink) -> str:
        if str(path) == str(link):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return readlink(path)

    monkeypatch.setattr(os, "readlink", readlink)
    capabilities = {"count": {"runner": "proc", "rights": {"read": [f"{link}/hosts"]}}}
    faults = faults_of(tmp_path, native(capabilities=capabilities))
    assert list(faults) == ["$.capabilities.count.rights.read[0]"]
    assert "Permission denied" in faults["$.capabilities.count.rights.read[0]"]


@pytest.mark.parametrize("mode", ["auto", "spawn", "fork", "worker"])
def test_what_this_version_keeps_is_no_warning(tmp_path: Path, mode: str) -> None:
    capabilities = {"count": {"runner": "proc", "rights": {"network": True}}}
    entrypoints = {"proc": {"command": ["./tool"], "mode": mode}}
    policy = {"requires_auth": False, "deterministic": True}
    document = native(secrets=[], capabilities=capabilities, entrypoints=entrypoints, policy=policy)
    assert read(tmp_path, document).warnings == ()


def test_a_number_is_accepted_as_far_as_envelopes_can_carry_it(tmp_path: Path) -> None:
    largest = read(tmp_path, shape_b(resources={"memory_mb": LARGEST_INTEGER}))
    assert canonical(largest.resources) == b'{"memory_mb":9007199254740991}'
    for beyond in (LARGEST_INTEGER + 1, -LARGEST_INTEGER - 1):
        assert list(faults_of(tmp_path, shape_b(resources={"memory_mb": beyond}))) == ["$.resources.memory_mb"]


def test_a_timeout_is_a_float_of_a_millisecond_or_more(tmp_path: Path) -> None:
    short = read(tmp_path, shape_a(timeout_ms=1)).capabilities["run"].timeout_s
    whole = read(tmp_path, shape_b(capabilities={"a": PLAIN["count"] | {"timeout_s": 2}})).capabilities["a"].timeout_s
    assert [short, whole] == [0.001, 2.0]
    assert type(short) is type(whole) is float


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    document = native(
        name="other",
        version=3,
        phases=["OPEN", "NAP"],
        entrypoints={
            "proc": {"command": [], "mode": "forks", "workers": {"cuont": 2}},
            "http": {"base_url": "ftp://x", "redy_path": "/x"},
        },
        env=["NOT-A-NAME"],
    )
    document["capabilities"]["count"] |= {
        "timeout_s": -1,
        "memory": "HUGE",
        "rights": {"read": ["~/x"]},
        "concurency": 1,
    }
    document["capabilities"]["bad name"] = {"runner": "htpp"}
    faults = faults_of(tmp_path, document, name="tool")
    assert set(faults) == {
        "$.name",
        "$.version",
        "$.phases[1]",
        "$.entrypoints.proc.command",
        "$.entrypoints.proc.mode",
        "$.entrypoints.http.base_url",
        "$.entrypoints.proc.workers.cuont",
        "$.entrypoints.http.redy_path",
        "$.env[0]",
        "$.capabilities.count.timeout_s",
        "$.capabilities.count.memory",
        "$.capabilities.count.rights.read[0]",
        "$.capabilities.count.concurency",
        "$.capabilities['bad name']",
        "$.capabilities['bad name'].runner",
    }
    assert '"worker"' in faults["$.entrypoints.proc.mode"]
    assert "'count'" in faults["$.entrypoints.proc.workers.cuont"]
    assert "'ready_path'" in faults["$.entrypoints.http.redy_path"]
    assert '"NAP"' in faults["$.phases[1]"]
    assert '"SEAL"' in faults["$.phases[1]"]
    assert "MINIMAL" in faults["$.capabilities.count.memory"]
    assert "'http'" in faults["$.capabilities['bad name'].runner"]


@pytest.mark.parametrize(
    ("document", "path", "said"),
    [
        (shape_a(entrypoint="python3 'run.py"), "$.entrypoint", "quot"),
        (shape_a(entrypoint="  "), "$.entrypoint", "program"),
        (shape_a(entrypoint="run\0me"), "$.entrypoint", "NUL"),
        (shape_a(phases=["OPEN", "open"]), "$.phases[1]", "OPEN"),
        (shape_a(phases=[]), "$.phases", "minItems"),
        (shape_a(capabilities=["analysis", "root"]), "$.capabilities[1]", "exec"),
        (shape_a(op_policy={"hash": ["write"]}), "$.op_policy.hash[0]", "analysis"),
        (shape_a(timeout_ms=0), "$.timeout_ms", "0"),
        (shape_a(timeout_ms=0.5), "$.timeout_ms", "1 or more"),
        (shape_b(capabilities={"a": {"runner": "proc", "timeout_s": 0.0005}}), "$.capabilities.a.timeout_s", "0.001"),
        (shape_a(timeout_ms=True), "$.timeout_ms", "number"),
        (shape_a(default_profile="MEM[SOFT=9,HARD=1,VOL=LOW]"), "$.default_profile", "HARD"),
        ({"name": "x", "version": "1", "capabilities": ["analysis"]}, "$.entrypoint", "required"),
        (shape_b(capabilities={}), "$.capabilities", "{}"),
        (shape_b(capabilities={"a": {"path": "/x"}}), "$.capabilities.a.runner", "required"),
        (shape_b(capabilities={"a": 5}), "$.capabilities.a", "object"),
        (shape_b(capabilities={"a": {"runner": "http", "method": "post"}}), "$.capabilities.a.method", "POST"),
        (shape_b(capabilities={"ping": {"runner": "proc"}, "psyfi.ping": {"runner": "proc"}}),
         "$.capabilities['psyfi.ping']", "second"),
        (shape_b(entrypoints={"http": {"base_url": "http://h"}}, capabilities={"a": {"runner": "proc"}}),
         "$.entrypoints.proc", "'proc'"),
        (shape_b(entrypoints={"proc": {"command": ["x"]}}, capabilities={"a": {"runner": "http"}}),
         "$.entrypoints.http", "'http'"),
        (shape_b(entrypoints={"proc": {"command": ["", "x"]}}, capabilities={"a": {"runner": "proc"}}),
         "$.entrypoints.proc.command[0]", "program"),
        (shape_b(resources={"memory_mb": 1e300}), "$.resources.memory_mb", "number"),
        (shape_b(description="\ud800"), "$.description", "surrogate"),
        (native(capabilities={"a": {"runner": "proc", "phases": ["SEAL"]}}), "$.capabilities.a.phases", "SEAL"),
        (native(capabilities={"a": {"runner": "proc", "memory": "MINIMAL", "default_profile": "MINIMAL"}}),
         "$.capabilities.a.default_profile", "memory"),
        (native(capabilities={"a": {"runner": "proc", "concurrency": 0}}), "$.capabilities.a.concurrency", "0"),
        (native(entrypoints={"proc": {"command": ["x"], "moed": "fork"}}), "$.entrypoints.proc.moed", "'mode'"),
    ],
)  # fmt: skip
def test_a_fault_names_the_path_and_what_is_allowed(
    tmp_path: Path, document: dict[str, Any], path: str, said: str
) -> None:
    faults = faults_of(tmp_path, document)
    assert list(faults) == [path]
    assert said in faults[path]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host",
        "host:80",
        "http://",
        "http://h:99999",
        "http://[x",
        "http://h/?a=1",
        "http://h/#a",
        "http://h o",
        "http://...",
        "http://.",
        "http://-",
        "http://a..b",
        "http://.a",
        "http://[::x]",
        "http://a%20b",
        "http://a,b",
        f"http://{'a' * 64}",
        "http://u@",
        "http://:80",
    ],
)
def test_a_base_url_must_be_http_with_a_host_and_no_query(tmp_path: Path, url: str) -> None:
    document = shape_b(entrypoints={"http": {"base_url": url}}, capabilities={"a": {"runner": "http"}})
    assert list(faults_of(tmp_path, document)) == ["$.entrypoints.http.base_url"]


@pytest.mark.parametrize(
    "url",
    ["http://localhost:1", "https://a-b.example.com./x", "http://my_service/", "http://127.0.0.1", "http://[::1]:80",
     "http://bücher.example", "http://user:secret@h", "http://1.example"],
)  # fmt: skip
def test_a_host_is_a_name_or_an_address(tmp_path: Path, url: str) -> None:
    document = shape_b(entrypoints={"http": {"base_url": url}}, capabilities={"a": {"runner": "http"}})
    assert read(tmp_path, document).capabilities["a"].url == url


# Ways to run


def with_proc(**proc: Any) -> dict[str, Any]:
    return native(secrets=[], entrypoints={"proc": {"command": ["./tool"]} | proc}, capabilities=PLAIN)


def with_http(**http: Any) -> dict[str, Any]:
    return shape_b(entrypoints={"http": http}, capabilities={"a": {"runner": "http", "path": "/a"}})


def test_a_fork_preloads_each_module_once(tmp_path: Path) -> None:
    for mode in ({"mode": "fork"}, {"mode": "auto"}, {}):
        manifest = read(tmp_path, with_proc(preload=["numpy", "xml.dom", "numpy"], **mode))
        assert (manifest.preload, manifest.stdin) == (("numpy", "xml.dom"), "file")
        assert manifest.mode == mode.get("mode", "auto")


def test_a_worker_has_a_pool_and_a_pipe(tmp_path: Path) -> None:
    workers = {"count": 2, "max_calls": 50.0, "max_mb": 300, "start_timeout_s": 90}
    for stdin in ({}, {"stdin": "pipe"}):
        manifest = read(tmp_path, with_proc(mode="worker", workers=workers, **stdin))
        assert (manifest.mode, manifest.stdin, manifest.workers) == ("worker", "pipe", Workers(2, 50, 300, 90.0))
        assert type(manifest.workers.max_calls) is int


def test_what_is_not_said_of_workers_is_as_in_the_code(tmp_path: Path) -> None:
    assert read(tmp_path, with_proc(mode="worker")).workers == Workers()
    assert read(tmp_path, with_proc(mode="worker", workers={"count": 64})).workers == Workers(count=64)
    assert read(tmp_path, with_proc()).workers == Workers()


def test_a_command_makes_a_service_that_the_bus_starts(tmp_path: Path) -> None:
    given = {"ready_path": "/health?deep=1", "start_timeout_s": 60, "idle_s": 0.5, "max_mb": 900}
    manifest = read(tmp_path, with_http(command=["python3", "service.py"], **given))
    assert manifest.service == Service(("python3", "service.py"), "/health?deep=1", 60.0, 0.5, 900)
    assert type(manifest.service.start_timeout_s) is float
    assert (manifest.shape, manifest.warnings) == ("native", ())
    assert read(tmp_path, with_http(command=["./service"])).service == Service(("./service",))


@pytest.mark.parametrize(
    ("path", "url"),
    [("/run", "/run"), ("run", "/run"), ("//evil.example/x", "/evil.example/x"), ("", "/"), (None, "/")],
)
def test_of_a_service_that_the_bus_starts_a_url_is_the_path_alone(tmp_path: Path, path: str | None, url: str) -> None:
    capability = {"runner": "http"} if path is None else {"runner": "http", "path": path}
    document = shape_b(entrypoints={"http": {"command": ["./service"]}}, capabilities={"a": capability})
    assert read(tmp_path, document).capabilities["a"].url == url


@pytest.mark.parametrize(
    ("http", "url"),
    [
        ({"base_url": "http://h/v1/", "purge_path": "/purge?deep=1"}, "http://h/v1/purge?deep=1"),
        ({"command": ["x"], "purge_path": "/purge"}, "/purge"),
        ({"command": ["x"], "purge_path": "//evil.example/x"}, "/evil.example/x"),
        ({"command": ["x"]}, None),
    ],
)
def test_a_service_takes_a_purge_where_it_says(tmp_path: Path, http: dict[str, Any], url: str | None) -> None:
    manifest = read(tmp_path, with_http(**http))
    assert (manifest.shape, manifest.purge_url, manifest.takes_purges) == ("native", url, url is not None)


def test_workers_take_a_purge_where_the_manifest_says_so(tmp_path: Path) -> None:
    assert read(tmp_path, with_proc(mode="worker", workers={"purge": True})).takes_purges
    assert not read(tmp_path, with_proc(mode="worker", workers={"purge": False})).takes_purges
    assert not read(tmp_path, with_proc(mode="worker")).takes_purges


def test_programs_and_a_service_may_stand_in_one_manifest(tmp_path: Path) -> None:
    entrypoints = {"proc": {"command": ["./tool"], "mode": "worker"}, "http": {"command": ["./service"]}}
    capabilities = {"a": {"runner": "http", "path": "a"}, "b": {"runner": "proc", "path": "b"}}
    manifest = read(tmp_path, shape_b(entrypoints=entrypoints, capabilities=capabilities))
    assert (manifest.mode, manifest.service) == ("worker", Service(("./service",)))
    assert manifest.capabilities["a"].url == "/a"
    assert manifest.capabilities["b"].argv == ("./tool", "b", "--stdin-json")


def test_a_service_that_runs_by_itself_is_none_of_the_bus(tmp_path: Path) -> None:
    assert read(tmp_path, with_http(base_url="http://h")).service is None


def test_shape_a_knows_no_ways_to_run(tmp_path: Path) -> None:
    entrypoints = {"proc": {"command": ["x"], "mode": "worker", "preload": ["os"]}, "http": {"command": ["x"]}}
    a = read(tmp_path, shape_a(entrypoints=entrypoints, mode="worker"))
    assert (a.mode, a.stdin, a.preload, a.workers, a.service) == ("auto", "file", (), Workers(), None)
    assert len(a.warnings) == 2


@pytest.mark.parametrize(
    ("document", "path", "said"),
    [
        (with_proc(mode="zygote"), "$.entrypoints.proc.mode", '"fork"'),
        (with_proc(mode="worker", stdin="file"), "$.entrypoints.proc.stdin", '"pipe"'),
        (with_proc(mode="worker", preload=["os"]), "$.entrypoints.proc.preload", "spawn and worker"),
        (with_proc(mode="spawn", preload=["os"]), "$.entrypoints.proc.preload", "spawn and worker"),
        (with_proc(mode="fork", workers={}), "$.entrypoints.proc.workers", "mode worker"),
        (with_proc(workers={"count": 2}), "$.entrypoints.proc.workers", "mode worker"),
        (with_proc(preload="os"), "$.entrypoints.proc.preload", "array"),
        (with_proc(preload=["os", "os.path; x"]), "$.entrypoints.proc.preload[1]", "matches"),
        (with_proc(preload=["os"] * 101), "$.entrypoints.proc.preload", "100"),
        (with_proc(mode="worker", workers=2), "$.entrypoints.proc.workers", "object"),
        (with_proc(mode="worker", workers={"count": 0}), "$.entrypoints.proc.workers.count", "1 or more"),
        (with_proc(mode="worker", workers={"count": 65}), "$.entrypoints.proc.workers.count", "64 or less"),
        (with_proc(mode="worker", workers={"max_calls": 1.5}), "$.entrypoints.proc.workers.max_calls", "integer"),
        (with_proc(mode="worker", workers={"start_timeout_s": 0}), "$.entrypoints.proc.workers.start_timeout_s", "0"),
        (with_proc(mode="worker", workers={"max_mb": 0}), "$.entrypoints.proc.workers.max_mb", "1 or more"),
        (with_proc(mode="worker", workers={"max_call": 1}), "$.entrypoints.proc.workers.max_call", "'max_calls'"),
        (with_proc(prelaod=[], mode="fork"), "$.entrypoints.proc.prelaod", "'preload'"),
        (with_http(command=["x"], base_url="http://h"), "$.entrypoints.http.base_url", "where command is given"),
        (with_http(), "$.entrypoints.http.base_url", "required"),
        (with_http(base_url="http://h", ready_path="/x"), "$.entrypoints.http.ready_path", "no command"),
        (with_http(base_url="http://h", start_timeout_s=5), "$.entrypoints.http.start_timeout_s", "no command"),
        (with_http(base_url="http://h", idle_s=5), "$.entrypoints.http.idle_s", "no command"),
        (with_http(base_url="http://h", max_mb=5), "$.entrypoints.http.max_mb", "no command"),
        (with_http(command="python3 x"), "$.entrypoints.http.command", "array"),
        (with_http(command=[""]), "$.entrypoints.http.command[0]", "the name of a program"),
        (with_http(command=["x"], ready_path="health"), "$.entrypoints.http.ready_path", "^/"),
        (with_http(command=["x"], ready_path="/a b"), "$.entrypoints.http.ready_path", "^/"),
        (with_http(command=["x"], purge_path="purge"), "$.entrypoints.http.purge_path", "^/"),
        (with_proc(mode="worker", workers={"purge": "yes"}), "$.entrypoints.proc.workers.purge", "boolean"),
        (with_proc(mode="worker", purge=True), "$.entrypoints.proc.purge", "unknown"),
        (with_http(command=["x"], start_timeout_s=0), "$.entrypoints.http.start_timeout_s", "more than 0"),
        (with_http(command=["x"], start_timeout_s=3601), "$.entrypoints.http.start_timeout_s", "3600 or less"),
        (with_http(command=["x"], idle_s=0), "$.entrypoints.http.idle_s", "more than 0"),
        (with_http(command=["x"], idle_s=86401), "$.entrypoints.http.idle_s", "86400 or less"),
        (with_http(command=["x"], max_mb=0.5), "$.entrypoints.http.max_mb", "integer"),
        (with_http(command=["x"], idle=1), "$.entrypoints.http.idle", "'idle_s'"),
    ],
)  # fmt: skip
def test_a_way_to_run_that_cannot_be_is_one_fault(
    tmp_path: Path, document: dict[str, Any], path: str, said: str
) -> None:
    faults = faults_of(tmp_path, document)
    assert list(faults) == [path]
    assert said in faults[path]


def test_the_entrypoints_that_the_readme_shows_are_sound(tmp_path: Path) -> None:
    shown = re.findall(
        r"^```text\n(\"entrypoints\".*?)^```$", (REPO / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    head = {"name": "x", "version": "1", "capabilities": PLAIN}
    found = [read(tmp_path, head | json.loads(f"{{{text}}}")) for text in shown]
    assert [(manifest.mode, manifest.service is None) for manifest in found] == [("worker", True), ("auto", False)]


def test_where_neither_a_url_nor_a_command_is_given_both_are_named(tmp_path: Path) -> None:
    said = faults_of(tmp_path, native(entrypoints={"http": {}}, capabilities={"a": {"runner": "http"}}))
    assert list(said) == ["$.entrypoints.http.base_url"]
    assert "or command" in said["$.entrypoints.http.base_url"]


LARGE = {
    "unknown phases": shape_a(phases=["NAP"] * 50_000),
    "surrogates": shape_a(phases=["\ud800"] * 5_000),
    "unknown keys in native": native(
        capabilities={"a": {"runner": "proc", "concurrency": 1} | {f"k{number}": 1 for number in range(50_000)}}
    ),
    "capabilities without a runner": shape_b(capabilities={f"c{number}": {} for number in range(50_000)}),
    "capabilities with a bad rune": shape_b(
        capabilities={f"c{number}": {"runner": "proc", "default_profile": "x"} for number in range(2_000)}
    ),
    "bad schemas": native(
        capabilities={"a": {"runner": "proc", "input_schema": {"anyOf": [{"type": f"t{n}"} for n in range(5_000)]}}}
    ),
    "bad references": native(
        capabilities={"a": {"runner": "proc", "input_schema": {"anyOf": [{"$ref": f"#/{n}"} for n in range(500)]}}}
    ),
}


@pytest.mark.parametrize("document", LARGE.values(), ids=LARGE.keys())
def test_of_a_manifest_that_is_wrong_all_over_some_is_said_and_that_there_is_more(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    with pytest.raises(ManifestError) as caught:
        manifests.read(put(tmp_path, document))
    faults = caught.value.faults
    assert len(faults) == 101
    assert faults[-1].found == "more faults"
    assert len(json.dumps(caught.value.body())) < 100_000


def test_what_is_said_of_one_fault_has_an_end(tmp_path: Path) -> None:
    long = "x" * 100_000
    capabilities = {long: {"runner": long, "memory": long, long: 1}}
    with pytest.raises(ManifestError) as caught:
        manifests.read(put(tmp_path, native(version=[long], name=long, capabilities=capabilities), name="tool"))
    assert len(caught.value.faults) >= 3
    for fault in caught.value.faults:
        assert max(len(fault.path), len(fault.found)) <= 120
        assert len(fault.allowed) <= 400
    assert len(caught.value.detail) < 3_000


def test_a_manifest_with_faults_has_its_warnings_too(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        manifests.read(put(tmp_path, native(version=1, extra=1)))
    assert "$.extra" in caught.value.warnings[0]


def test_warnings_have_an_end(tmp_path: Path) -> None:
    manifest = read(tmp_path, shape_a(**{f"k{number}": 1 for number in range(1000)}))
    assert len(manifest.warnings) == 101
    assert manifest.warnings[-1] == "there are more warnings"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strng"},
        {"properties": []},
        {"pattern": "["},
        {"pattern": "a{99999999999999999999}"},
        {"$ref": "https://example.com/schema"},
        {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        {"items": {"$ref": "#/$defs/missing"}},
        {"allOf": [{"$dynamicRef": "http://[bad"}]},
        {"$ref": "#/title", "title": "a text"},
        {"$ref": "#/required/x", "required": ["a"]},
    ],
)
def test_a_capability_schema_must_be_usable_without_fetching_anything(tmp_path: Path, schema: dict[str, Any]) -> None:
    document = native(capabilities={"a": {"runner": "proc", "input_schema": schema}})
    paths = list(faults_of(tmp_path, document))
    assert paths
    assert all(path.startswith("$.capabilities.a.input_schema") for path in paths)


def test_a_word_that_only_looks_like_a_reference_is_no_fault(tmp_path: Path) -> None:
    schema = {"properties": {"$ref": {"type": "string"}}, "enum": [{"$ref": "https://example.com"}]}
    manifest = read(tmp_path, native(capabilities={"a": {"runner": "proc", "output_schema": schema}}))
    assert manifest.capabilities["a"].output_schema == schema


def test_another_runner_that_is_known_takes_the_entrypoint_there_is(tmp_path: Path) -> None:
    folder = put(tmp_path, shape_b(entrypoints={"proc": {"command": ["x"]}}, capabilities={"a": {"runner": "box"}}))
    manifest = manifests.read(folder, runners=["proc", "http", "box"])
    assert (manifest.capabilities["a"].runner, manifest.capabilities["a"].argv) == ("box", ("x", "--stdin-json"))


@pytest.mark.parametrize("name", ["Upper", "-x", "a b", "a" * 65, "ünï"])
def test_a_name_must_match_the_pattern_even_if_the_folder_has_it_too(tmp_path: Path, name: str) -> None:
    assert "$.name" in faults_of(tmp_path, shape_a(name=name))


def test_a_link_is_named_by_itself_and_its_folder_is_resolved(tmp_path: Path) -> None:
    put(tmp_path, shape_a(name="linked"), name="abraxas-1.0")
    (tmp_path / "linked").symlink_to("abraxas-1.0")
    manifest = manifests.read(tmp_path / "linked")
    assert (manifest.name, manifest.folder.name) == ("linked", "abraxas-1.0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "line 1"),
        (b'{"name": "x", "ver', "line 1"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'{"name": "x", "name": "y"}', "twice"),
        (b'{"name": NaN}', "NaN"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"name": "' + b"x" * 1_000_001 + b'"}', "larger"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_what_is_no_json_object_is_one_clear_fault(tmp_path: Path, text: bytes, said: str) -> None:
    faults = faults_of(tmp_path, text, name="x")
    assert said in " ".join(faults.values())


def test_a_manifest_that_cannot_be_read_is_one_fault(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    file = folder / "manifest.json"

    def refused(said: str) -> None:
        with pytest.raises(ManifestError, match=said) as caught:
            manifests.read(folder)
        assert [fault.path for fault in caught.value.faults] == ["manifest.json"]

    refused("No such file")
    folder.mkdir()
    refused("No such file")
    file.mkdir()
    refused("directory")
    file.rmdir()
    os.mkfifo(file)
    refused("no file")
    file.unlink()
    file.symlink_to("manifest.json")
    refused("links")


@pytest.mark.usefixtures("bound_by_modes")
def test_a_manifest_without_permission_to_read_is_one_fault(tmp_path: Path) -> None:
    folder = put(tmp_path, shape_a())
    (folder / "manifest.json").chmod(0)
    with pytest.raises(ManifestError, match="Permission denied"):
        manifests.read(folder)


def test_what_is_said_of_a_folder_whose_name_is_no_text_is_text(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        manifests.read(put(tmp_path, shape_a(name="bad"), name=os.fsdecode(b"bad\xff")))
    assert [fault.path for fault in caught.value.faults] == ["$.name"]
    assert r"bad\\xff" in caught.value.detail
    json.dumps(caught.value.body(), ensure_ascii=False).encode()


def test_a_path_with_nul_is_a_fault_too(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="null"):
        manifests.read(tmp_path / "a\0b")


_KEYS = st.sampled_from(
    ["name", "version", "entrypoint", "capabilities", "entrypoints", "phases", "proc", "http", "command", "base_url",
     "runner", "path", "rights", "read", "network", "memory", "input_schema", "$ref", "op_policy", "policy", "env",
     "secrets", "permissions", "ping", "notes", "mode", "stdin", "preload", "workers", "count", "ready_path", "idle_s"]
) | st.text(max_size=3)  # fmt: skip
_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["proc", "http", "OPEN", "exec", "MINIMAL", "#/x", "http://h", "x", "worker", "fork", "/x"])
)  # fmt: skip
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=6), max_leaves=25
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=_JSON, base=st.sampled_from([{}, shape_a(), shape_b(), native()]), key=_KEYS)
def test_any_json_document_is_a_manifest_or_a_manifest_error(
    tmp_path: Path, document: object, base: dict[str, Any], key: str
) -> None:
    said: list[ManifestError] = []
    for value in (document, base | {key: document}, base | {"capabilities": {"ping": document, "x": {key: document}}}):
        folder = put(tmp_path, json.dumps(value).encode(), name="x")
        try:
            assert manifests.read(folder).name == "x"
        except ManifestError as error:
            said.append(error)
    assert all(error.faults and str(error).encode() for error in said)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=60))
def test_any_bytes_are_a_manifest_error(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ManifestError):
        manifests.read(put(tmp_path, text, name="x"))


def test_rune_text_and_profile_names_are_both_profiles(tmp_path: Path) -> None:
    document = shape_a(default_profile="MEM[SOFT=1,HARD=2,VOL=LOW];PRIORITY=9")
    assert read(tmp_path, document).capabilities["run"].memory.priority == 9
    assert read(tmp_path, shape_a(default_profile="PERFORMANCE")).capabilities["run"].memory == runes.resolve(
        "PERFORMANCE"
    )
