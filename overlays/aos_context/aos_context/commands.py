"""What the commands of `cli` do. Each prints what it found and returns its exit status."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from aos_context import contract, demo, pack_check
from aos_context.artifacts import to_json
from aos_context.errors import ContextError
from aos_context.opening import opened
from aos_context.operations import perform
from aos_context.serving import serve
from aos_context.settings import from_environment

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from aos_context.pack_check import FileVerdict, Verdict
    from aos_context.settings import Settings


def run(options: argparse.Namespace) -> int:
    """Errors go to stderr with what to do about them."""
    try:
        return _COMMANDS[options.command](options)
    except (ContextError, OSError) as error:
        hint = f"\n{error.hint}" if isinstance(error, ContextError) and error.hint else ""
        sys.stderr.write(f"aos_context: {error}{hint}\n")
        return 1


def _demo(options: argparse.Namespace) -> int:
    with opened(_settings(options)) as runs:
        demo.play(runs, _say)
    return 0


def _serve(options: argparse.Namespace) -> int:
    settings = _settings(options)
    settings = dataclasses.replace(settings, testing=settings.testing or options.testing)
    with opened(settings):
        pass  # what is wrong with the folder is said in one sentence, and not by the server's traceback
    return serve(settings, options.host, options.port)


def _verify(options: argparse.Namespace) -> int:
    given = {"manifest_sha256": options.manifest_sha256, "root": options.root}
    report = pack_check.check_against_ledger(options.pack, options.ledger, **given)
    faults: list[Verdict | FileVerdict] = [
        *report.faults(allow_unrecorded=options.allow_unrecorded, strict=options.strict),
        *report.file_faults(strict=options.strict),
    ]
    if options.json:
        _say(to_json(dataclasses.asdict(report) | {"ok": not faults}).decode())
        return 1 if faults else 0
    for one in report.verdicts:
        _say(f"{_word(one, faults)} {one.item_id}  {one.reason or f'line {one.seq}, request {one.committed_by}'}")
    for file in report.files:
        _say(f"{_word(file, faults)} {file.file}  {file.reason or f'line {file.seq}'}")
    for what in report.unchecked:
        _say(f"not vouched for: {what}")
    said = (
        f"{len(report.verdicts)} memories and {len(report.files)} files of pack {report.pack_id}, run {report.run_id}"
    )
    sound = "all as they should be" if report.is_vouched else "as they should be, as far as the ledger vouches for them"
    _say(f"{said}: {len(faults)} not as they should be" if faults else f"{said}: {sound}")
    return 1 if faults else 0


def _word(one: Verdict | FileVerdict, faults: list[Verdict | FileVerdict]) -> str:
    return "BAD " if one in faults else "open" if one.is_open else "ok  "


def _runs(options: argparse.Namespace) -> int:
    with opened(_settings(options), makes=False) as runs:
        found = runs.list()
    if options.json:
        _say(to_json(found).decode())
        return 0
    for one in found:
        where = one.get("error") or f"{one['status']:8} {one['current_stage']:10} {one['objective'][:60]!r}"
        _say(f"{one['run_id']}  {where}")
    return 0


def _brief(options: argparse.Namespace) -> int:
    asked = {"budget": options.budget, "q": options.query}
    payload = {"run_id": options.run} | {name: value for name, value in asked.items() if value is not None}
    with opened(_settings(options), makes=False) as runs:
        _say(perform(runs, "brief", payload)["brief"])
    return 0


def _check(options: argparse.Namespace) -> int:
    with opened(_settings(options), makes=False) as runs:
        found = runs.open(options.run).check()
    said = f"{options.run}: {found.events} events and {found.episodes} episodes, all as they were written"
    if found.shown < found.events:
        said += f"; of the events from line {found.shown + 1} on, which are in no episode yet, only the form is known"
    _say(said)
    return 0


def _snapshot(options: argparse.Namespace) -> int:
    payload = {"run_id": options.run, "zip_pack": not options.folder}
    with opened(_settings(options), makes=False) as runs:
        _say(perform(runs, "snapshot", payload)["pack_path"])
    return 0


def _load(options: argparse.Namespace) -> int:
    """The operator may load a pack from anywhere, where a caller of the service may not; the rest is as theirs."""
    contract.capability("load").check_input({"pack_path": str(options.pack), "new_run_id": options.run_id})
    with opened(_settings(options)) as runs:
        loaded = runs.load_file(options.pack, options.run_id)
    _say(f"{loaded.run.run_id} goes on from {loaded.from_run_id}, pack {loaded.pack_id}")
    if loaded.memory is not None:
        _say(f"{loaded.memory.staged} memories wait for a milestone as {loaded.memory.batch_id}")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    settings = from_environment(os.environ)
    return settings if options.root is None else dataclasses.replace(settings, root=options.root)


def _say(line: str) -> None:
    """The answer, each line at once. A reader that has gone ends the saying and not what is done (`demo | head -1`)."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "serve": _serve,
    "verify": _verify,
    "runs": _runs,
    "brief": _brief,
    "check": _check,
    "snapshot": _snapshot,
    "load": _load,
}
