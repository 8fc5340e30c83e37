"""Whether a resume pack is what the bus's ledger says: its memories committed through the bus, in SEAL, as they are.

Each memory item has in `committed_by` the bus's request id of the call that committed it. The bus's ledger has a line
for that call, whose hash, links and members are looked at here. A line that holds the call's payload also says which
run and batch it was about. Nothing of the bus is needed for that, only its ledger's files.

An id shows nothing of what the pack holds. That the lines' `result_hash` does, of the answer of the milestone, of a
commit and of the snapshot, which are made anew from the pack (`pack_answers`): the snapshot's line vouches for all of
the pack, the last milestone's for its episode and, by the chain of hashes, for all that was committed before its end.
What no line vouches for is said (`Report.unchecked`), or open where it is a memory.

Where the answer of a call was lost and no later call shows what came of it (`bus_calls`), the item is open: neither
shown nor against the pack.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aos_context.bus_calls import BATCH_MEMBERS, UNKNOWN, Call, Found, Lost, find
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.episode import file_name
from aos_context.layout import EPISODES, LEDGER, PACK_MANIFEST, WORKING_SET
from aos_context.pack_answers import Answers, answers_of
from aos_context.resume_pack import CheckedPack, check

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_UNRECORDED = "it was committed without a bus"


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one memory item. `reason` says what is wrong, and is None where nothing is."""

    item_id: str
    batch_id: str
    committed_by: str | None
    seq: int | None
    """The number of the ledger's line."""
    reason: str | None
    is_recorded: bool
    """Whether it says which call committed it."""
    is_open: bool = False
    """Whether the call's answer was lost and no later call shows that it committed: it may have, or not."""

    @property
    def ok(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class FileVerdict:
    """On a file of the pack of which the ledger has a line: its episode, its manifest. `reason` as a `Verdict` has."""

    file: str
    seq: int | None
    reason: str | None
    is_open: bool = False
    """Whether the line may be that of the same pack in another place, or its answer was lost."""


@dataclass(frozen=True, slots=True)
class Report:
    """On all memory items of a pack, in its order, and on its files."""

    pack_id: str
    run_id: str
    manifest_sha256: str
    lines: int
    """How many lines of the ledger were read."""
    verdicts: tuple[Verdict, ...]
    files: tuple[FileVerdict, ...] = ()
    unchecked: tuple[str, ...] = ()
    """What there was nothing to check by, a sentence each."""

    def faults(self, *, allow_unrecorded: bool = False, strict: bool = False) -> list[Verdict]:
        """The verdicts that stand against the pack.

        With `allow_unrecorded` not those on commits without a bus; with `strict` those that are open, too.
        """
        return [
            one
            for one in self.verdicts
            if not one.ok and (one.is_recorded or not allow_unrecorded) and (strict or not one.is_open)
        ]

    def file_faults(self, *, strict: bool = False) -> list[FileVerdict]:
        """Those on files, with `strict` as `faults` has it."""
        return [one for one in self.files if one.reason is not None and (strict or not one.is_open)]

    def ok(self, *, allow_unrecorded: bool = False, strict: bool = False) -> bool:
        return not self.faults(allow_unrecorded=allow_unrecorded, strict=strict) and not self.file_faults(strict=strict)

    @property
    def is_vouched(self) -> bool:
        """Whether nothing is open and nothing is left to be checked by something else."""
        is_open = any(one.is_open for one in self.verdicts) or any(one.is_open for one in self.files)
        return not self.unchecked and not is_open


def check_against_ledger(
    pack_path: Path,
    ledger_path: Path,
    config: Config = DEFAULT_CONFIG,
    *,
    manifest_sha256: str | None = None,
    root: Path | None = None,
    workspace: Path | None = None,
) -> Report:
    """Verify a pack, and find in the bus's ledger who committed its memories, made its episode and packed it.

    `ledger_path` is the ledger's file or the folder that it lies in. It is read once, from the first line to the last,
    with three lines in memory. With `manifest_sha256` it must be the pack with that manifest. `root` is the folder of
    runs that it was made in, for a pack that lies elsewhere. Raises as `resume_pack.check`; `NotFoundError` where there
    is no ledger, `BrokenError` where a segment cannot be unpacked.
    """
    with check(pack_path, config, manifest_sha256=manifest_sha256, workspace=workspace) as pack:
        answers = answers_of(pack, pack_path, root)
        named = {item["committed_by"] for item in pack.memory_items()} - {None}
        found = find(ledger_path, named | _named_by_files(pack), answers.all())
        bound = _Bound(pack, answers, found, is_placed=root is not None)
        files = tuple(bound.files())
        return Report(
            pack.manifest["pack_id"],
            pack.manifest["run_id"],
            pack.manifest_sha256,
            found.lines,
            tuple(bound.verdict(item) for item in pack.memory_items()),
            files,
            tuple(bound.unchecked(has_manifest_sha256=manifest_sha256 is not None)),
        )


def _named_by_files(pack: CheckedPack) -> set[str]:
    """The calls that its manifest and its episode say that they come from."""
    return {pack.manifest["packed_by"], pack.episode and pack.episode.get("request_id")} - {None}


class _Bound:
    """A pack, and what the ledger's lines say of it."""

    def __init__(self, pack: CheckedPack, answers: Answers, found: Found, *, is_placed: bool) -> None:
        self._pack, self._answers, self._found, self._is_placed = pack, answers, found, is_placed
        self._run_id = pack.manifest["run_id"]
        self._episode = file_name(pack.episode["number"]) if pack.episode else ""
        self._last_seq = pack.episode["ledger"]["last_seq"] if pack.episode else 0
        self._milestone = found.witness(answers.milestone)
        self._snapshot = found.witness(answers.snapshot)

    def files(self) -> Iterator[FileVerdict]:
        """On those that a line is about."""
        if (verdict := self._on_episode()) is not None:
            yield verdict
        if (verdict := self._on_manifest()) is not None:
            yield verdict

    def _on_episode(self) -> FileVerdict | None:
        name = f"{EPISODES}/{self._episode}"
        if self._milestone is not None:
            return FileVerdict(name, self._milestone, None)
        other = self._other_milestone()
        if other is None:
            return None
        why = f"line {other} has the hash of another answer: the milestone did not make this episode of these events"
        return FileVerdict(name, other, why, is_open=not self._answers.has_all_of_milestone)

    def _other_milestone(self) -> int | None:
        """The line of a milestone that the episode names, and that has answered with another one."""
        if self._pack.episode is None:
            return None
        made = self._pack.episode["memory"]["items"]
        for request_id in (self._pack.episode.get("request_id"), *(item["committed_by"] for item in made)):
            call = self._found.calls.get(request_id)
            if call is not None and call.capability == "milestone" and call.answered is not None:
                return call.seq
        return None

    def _on_manifest(self) -> FileVerdict | None:
        request_id = self._pack.manifest["packed_by"]
        if self._snapshot is not None:
            return FileVerdict(PACK_MANIFEST, self._snapshot, None)
        if request_id is None:
            return None
        call = self._found.calls[request_id]
        reason = self._misplaced(call)
        if reason is not None:
            return FileVerdict(PACK_MANIFEST, call.seq, reason)
        if call.answered is None:
            return FileVerdict(PACK_MANIFEST, call.seq, "the answer of its call was lost", is_open=True)
        why = f"line {call.seq} has the hash of another answer: it was made elsewhere, or is not what was answered"
        return FileVerdict(PACK_MANIFEST, call.seq, why, is_open=not self._is_placed)

    def _misplaced(self, call: Call) -> str | None:
        """Why a line cannot be the one of the snapshot."""
        if call.seq is None:
            return UNKNOWN
        is_one = call.capability == "snapshot"
        return call.fault or (None if is_one else f'the call\'s capability is "{call.capability}", not "snapshot"')

    def verdict(self, item: dict[str, Any]) -> Verdict:
        request_id, batch_id = item["committed_by"], item["batch_id"]
        if request_id is None:
            return Verdict(item["id"], batch_id, None, None, _UNRECORDED, is_recorded=False)
        call = self._found.calls[request_id]
        reason, is_open = call.reason, False
        if reason is None or call.lost is not None:
            reason = _payload_fault(call, item, self._run_id)
            if reason is None and call.lost is not None and not self._is_shown(call.lost, batch_id):
                reason, is_open = call.reason, True
        if reason is None:
            reason, is_open = self._content_fault(item, call)
        return Verdict(item["id"], batch_id, request_id, call.seq, reason, is_recorded=True, is_open=is_open)

    def _is_shown(self, lost: Lost, batch_id: str) -> bool:
        return lost.is_repeated or batch_id in self._found.committed

    def _content_fault(self, item: dict[str, Any], call: Call) -> tuple[str | None, bool]:
        """Why nothing shows that the item is what its call has committed, and whether it may be so all the same."""
        batch_id = item["batch_id"]
        is_before = self._answers.seqs[batch_id] <= self._last_seq
        wanted = self._answers.commits[batch_id]
        if self._snapshot is not None or (is_before and self._milestone is not None):
            return None, False
        if self._found.witness(wanted) is not None:
            return None, False
        if is_before and (other := self._other_milestone()) is not None:
            why = f"line {other} has the hash of another answer than the episode that stands for its commit"
            return why, not self._answers.has_all_of_milestone
        if call.answered is None:
            return None, False  # the ledger holds no hash to compare with
        if call.capability == "commit" and wanted:
            return f"line {call.seq} has the hash of another answer: the call did not commit this content", False
        return "no line that is known has the hash of an answer that its content is in", True

    def unchecked(self, *, has_manifest_sha256: bool) -> Iterator[str]:
        found = self._found
        bare = sum(1 for call in found.calls.values() if call.reason is None and call.payload is None)
        if bare and self._snapshot is None and self._milestone is None:
            yield f"run and batch of {bare} calls: the ledger does not hold their payloads"
        if has_manifest_sha256 or self._snapshot is not None:
            return
        why = "no SHA-256 of it was given, and no line of a snapshot that answered with it at this place is known"
        yield f"the manifest's own members, id, time and pointers among them: {why}"
        shown = self._last_seq if self._milestone is not None else 0
        if shown < self._pack.ledger_last_seq:
            lines_ = f"lines {shown + 1} to {self._pack.ledger_last_seq} of {LEDGER}"
            yield f"{lines_}, and {WORKING_SET} as they left it: no milestone's line vouches for them"


def _payload_fault(call: Call, item: dict[str, Any], run_id: str) -> str | None:
    """What is wrong with what a call asked for, as far as its line holds that."""
    if call.payload is None:
        return None
    for member, expected in (("run_id", run_id), (BATCH_MEMBERS[call.capability or ""], item["batch_id"])):
        if call.payload.get(member) != expected:
            return f"the call's payload has the {member} {json.dumps(call.payload.get(member))}, not {expected}"
    return None
