"""The ledger's file: one lock that every process takes, a chain of lines and their tree, an end that is always whole.

A group of records is written at once, under the lock, and made last without it: meanwhile others write, and their sync
is for it as well. What a failed write left is cut off again; what could not be synced stays, and is written once more.
So the file only grows, by whole lines: some of them, of a failed sync or a killed process, nobody was answered for.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
from typing import TYPE_CHECKING, Any, Literal

from bus import tails, unsynced
from bus.checkpoints import TYPE, Checkpoints, chained, root_at, tree_of
from bus.groups import Group
from bus.losses import Last, Losses
from bus.merkle import Frontier
from bus.model import now_ms
from bus.own_files import open_own
from bus.recent import RecentRoots
from bus.records import (
    GENESIS,
    BrokenLineError,
    check,
    draft,
    environment_hash,
    hash_in,
    is_foreign,
    parse,
    parse_or_none,
)
from bus.segments import (
    FILE_MODE,
    closed_backwards,
    closed_firsts,
    finish_rotation,
    identity,
    identity_at,
    lines_backwards,
    lock_path,
    make_folder,
    rotate,
    settle,
    sync_folder,
)
from bus.signed import Signed
from bus.unsynced import UNSYNCED_BYTES, Stretch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from bus.checkpoints import Note
    from bus.groups import Receipt
    from bus.notary import Notary
    from bus.records import Draft

PROBE_BYTES = 4096
CHECKPOINT_START = b'{"hash":'
"""Of every checkpoint's line, and of some others, but of no call's."""

PREV = b'"prev":"%b"'
"""Stands in the line behind the one that has this hash."""

_RECENT_BYTES = 1 << 18
_FEW_BYTES = 1 << 18
"""How much of what others have appended is taken in without a thread."""

_UNREAD = -1
"""The size of a file whose end is not read yet, be it empty: the chain may go on from a segment before, and a line may
be owed of what was cut off."""

_log = logging.getLogger(__name__)

Fsync = Literal["always", "batch", "never"]


class Chain:
    """The file, and what this process knows of it: its identity, size, last line. For one thread at a time.

    Every method raises `OSError` where the file system refuses, and leaves what it knows right, or unknown.
    """

    def __init__(
        self,
        path: Path,
        fsync: Fsync,
        environment: Mapping[str, Any],
        checkpoints: Checkpoints | None = None,
        *,
        segment_bytes: int = 0,
    ) -> None:
        """A segment of `segment_bytes` or more is closed before the next group; 0 is never."""
        self._tree = Frontier()
        self._recent = RecentRoots()
        self._checkpoints = checkpoints or Checkpoints(path)
        self._path = path
        self._lock_path = lock_path(path)
        self._fsync = fsync
        self._segment_bytes = segment_bytes
        self._closed = 0
        self._environment_hash = environment_hash(environment)
        self._environment = dict(environment)
        self._fd = -1
        self._lock_fd = -1
        self._identity: tuple[int, int] | None = None
        self._size = 0
        self._prev = GENESIS
        self._environment_stands = False
        self._losses = Losses()
        self._stood: Last | None = None
        """The last line that was known of a file that is to be looked at anew: it is to be there still."""
        self._synced = 0
        """The bytes of the file that are on the disk for certain: a sync of ours through this descriptor has ended."""
        self._lock_size = 0
        self._settled = 0
        """The length of the locks' file up to which all that was told there is settled."""
        self._untold: list[Stretch] = []
        """What could not be synced, and could not be told there either."""

    @property
    def seq(self) -> int:
        """Of the last line that is known."""
        return self._tree.size

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of all processes, with the file open and its end known.

        Raises `BrokenLineError` where the last line is not one that another can be chained to, or is not chained to
        those before it that were read: back to the last checkpoint.
        """
        self._lock()
        try:
            self._catch_up()
            yield
        finally:
            self.unlock()

    def try_lock(self) -> bool:
        """Take the lock of all processes if nobody has it and the file is as we left it, or nearly. Does not wait."""
        if self._lock_fd < 0:
            return False
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody has it; or it cannot be taken, which who waits for it will say
            return False
        try:
            if self._may_answer() and (self._is_as_left() or self._has_only_grown()) and not self._must_wait():
                return True
        except (OSError, BrokenLineError):  # which who waits for it will say
            pass
        self.unlock()
        return False

    def unlock(self) -> None:
        """Let go of the lock, whatever the file system says: its descriptor's end takes the lock with it."""
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        except OSError:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _must_wait(self) -> bool:
        """Whether what is to be written first takes a while: a new segment, or a checkpoint that is signed."""
        return self._is_full() or (self._is_checkpoint_due() and not self._is_covered())

    def _may_answer(self) -> bool:
        """Whether a group need not be kept back for the sake of what is signed with it."""
        notary = self._checkpoints.notary
        return notary is None or (notary.is_held and (notary.may_answer or self._fsync == "never"))

    def append(self, drafts: Sequence[Draft]) -> list[Receipt]:
        """Take the lock, write a group, and make it last while others write already. Raises as `locked`."""
        with self.locked():
            group = self.write(drafts)
        try:
            self.sync(group)
        except OSError:
            self.abandon()
            raise
        self._commit_and_keep(group)
        return self.vouch(group)

    def vouch(self, group: Group) -> list[Receipt]:
        """Where the records of a group stand that counts, with its note where that may be handed out.

        Without the lock; blocks for as long as it takes to tell.
        """
        receipts, note, notary = group.receipts(), group.note, self._checkpoints.notary
        if group.is_told or note is None or notary is None:
            return receipts
        with contextlib.suppress(OSError, BrokenLineError):  # the lines stand; who writes next says what is wrong
            if notary.vouch(note.signed, self._root_near):
                return receipts
            with self.locked():
                if self._vouched(note.signed, notary):
                    return receipts
        return [receipt._replace(checkpoint=None) for receipt in receipts]

    def _vouched(self, signed: Signed, notary: Notary) -> bool:
        """With the lock: whether a note may be handed out; where another process has signed, the log is held anew."""
        if not notary.vouch(signed, self._root_near) and not notary.is_held:
            notary.hold(self.seq, self._root_at)
            return notary.vouch(signed, self._root_at)
        return notary.is_held and notary.refusal is None

    def remember(self) -> None:
        """Make last what is remembered of what was signed. Without the lock; raises as `locked`."""
        notary = self._checkpoints.notary
        if notary is not None and not notary.remember():
            with self.locked():  # which holds the log anew, and remembers
                return

    def extend(self, drafts: Sequence[Draft], *, with_checkpoint: bool = False) -> list[Receipt]:
        """With the lock, write a group and make it last. All of it is in the file then, or nothing.

        A checkpoint comes behind it, in a group of its own.
        """
        if with_checkpoint and (drafts or self._losses):
            receipts = self.extend(drafts)
            self.extend((), with_checkpoint=True)
            return receipts
        group = self.write(drafts, with_checkpoint=with_checkpoint)
        with self.or_cut_back():
            self.sync(group)
        return self._commit_and_keep(group)

    def wants_checkpoint(self, *, at_end: bool = False) -> bool:
        """Whether there is to be a checkpoint, as far as is known; `at_end` is whether this writer is about to end."""
        return self._checkpoints.are_due(self.seq, at_end=at_end)

    def write(self, drafts: Sequence[Draft], *, with_checkpoint: bool = False) -> Group:
        """With the lock, write a group; it counts only once it is committed.

        Where the segment is full, the group begins a new one; where a checkpoint is due, it begins with that.
        """
        if self._is_full() and (drafts or self._losses or with_checkpoint):
            self._rotate()
            self._catch_up()
        group = Group(self._tree.copy(), self._prev, environment_stands=self._environment_stands)
        if with_checkpoint or self._is_checkpoint_due():
            self._add_checkpoint(group)
        for loss in self._losses.drafts():
            group.add(loss)
        for one in drafts:
            group.places.append(group.add(one))
            if not group.environment_stands and one.environment_hash == self._environment_hash:
                self._add_environment(group)
        if group.places and self._fsync != "never":
            group.note = self._checkpoints.note(group.tree)
        with self.or_cut_back():
            write_all(self._fd, group.text)
        return group

    def _add_environment(self, group: Group) -> None:
        """Its time is that of its group, as of every line: who heals the log goes by that."""
        members = {"environment": self._environment, "environment_hash": self._environment_hash}
        group.add(draft({"type": "environment", "timestamp_ms": now_ms(), **members}))
        group.environment_stands = True

    def _add_checkpoint(self, group: Group) -> None:
        note = group.checkpoint_note = self._note_of_all()
        group.checkpoint_seq, _ = group.add(self._checkpoints.draft(group.tree, note and note.text))

    def _rotate(self) -> None:
        try:
            rotate(self._path, self._fd, self.seq)
        except FileExistsError:
            raise
        except OSError:
            self._tell_unsynced()
            raise

    def _is_checkpoint_due(self) -> bool:
        """Whether the next group begins with one. What is owed comes first: each of that names the line that it is.

        A new segment does, so that who opens it need not read the one before.
        """
        if self._size == 0 and self.seq:
            return True
        return not self._losses and self._checkpoints.are_due(self.seq)

    def _is_covered(self) -> bool:
        """Whether the note of all lines was handed out before, or there is none."""
        notary = self._checkpoints.notary
        return notary is None or notary.refusal is not None or notary.covers(Signed(self.seq, self._tree.root()))

    def _note_of_all(self) -> Note | None:
        """The note for a checkpoint's line: as everybody can read that, it is handed out by being written.

        So all lines are synced before, those of others and with AAL_FSYNC=never too, and it is remembered.
        """
        note, notary = self._checkpoints.note(self._tree), self._checkpoints.notary
        if note is None or notary is None or notary.covers(note.signed):
            return note
        self._sync_file()
        return note if self._vouched(note.signed, notary) else None

    def sync(self, group: Group) -> None:
        """Make what was written last, as far as asked for."""
        if group.seq != self.seq and self.fd_to_sync(group) is not None:
            self._sync_file()

    def _sync_file(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._tell_unsynced()
            raise

    def fd_to_sync(self, group: Group) -> int | None:
        """The descriptor whose fdatasync is all that a written group wants; None where it wants nothing.

        What was signed must not be lost, whatever was asked for.
        """
        return None if self._fsync == "never" and group.checkpoint_note is None else self._fd

    def _commit_and_keep(self, group: Group) -> list[Receipt]:
        """As `commit`, and the note of its checkpoint is kept: for a thread that may wait for the disk."""
        receipts = self.commit(group)
        if group.checkpoint_seq is not None:
            self._checkpoints.keep(group.checkpoint_note)
        return receipts

    def commit(self, group: Group) -> list[Receipt]:
        """A group that was written and synced counts from now on. Gives where each record stands."""
        self._recent.add(self._tree, group.leaves)
        self._tree, self._prev, self._environment_stands = group.tree, group.prev, group.environment_stands
        self._size += len(group.text)
        if group.text and self.fd_to_sync(group) is not None:
            self._synced = self._size
        self._losses.clear()
        if group.checkpoint_seq is not None:
            self._checkpoints.stands(group.checkpoint_seq)
        note, notary = group.note, self._checkpoints.notary
        group.is_told = note is None or notary is None or notary.hand_out(note.signed, self._root_near)
        return group.receipts()

    def abandon(self) -> None:
        """Give up a group whose sync failed. Its lines stay, though nobody was answered for them.

        Others may have gone on from them. They are written once more before the next line, whoever writes that.
        """
        self._tell_unsynced()
        self._identity = None  # what the file holds is unknown: open it anew and read its end
        self._losses.clear()  # they were in the group, and stay with it

    def _tell_unsynced(self) -> None:
        """A sync failed: the kernel may have dropped all that was written since the last of ours, or of others."""
        if self._identity is None:
            return
        stretch = Stretch(self._identity, max(self._synced, self._size - UNSYNCED_BYTES))
        try:
            unsynced.tell(self._lock_fd, stretch)
        except OSError:
            self._untold.append(stretch)

    def _write_again(self) -> None:
        """Write what could not be synced once more, by whomever, before anything goes on from it."""
        if self._lock_size != self._settled or self._untold:
            self._settled = settle(self._path, self._lock_fd, self._untold)
            self._untold.clear()

    def _cut_back(self) -> None:
        """Leave the file as it was before a group that does not count."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._identity = None  # what the file holds is unknown: open it anew and read its end
            raise

    def rehearse(self) -> None:
        """Write at the end of the file as a record would be, and cut it off again."""
        try:
            write_all(self._fd, b" " * PROBE_BYTES)
            if self._fsync != "never":
                self._sync_file()
        finally:
            self._cut_back()

    def close(self) -> None:
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1
        self._identity = None

    def _lock(self) -> None:
        """Take the lock on the file that bears the lock's name now: somebody may have removed the folder since."""
        while True:
            if self._lock_fd < 0:
                make_folder(self._lock_path.parent, sync=self._is_to_last)
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
                self._lock_fd, self._settled = open_own(self._lock_path, flags, FILE_MODE), 0
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            status = os.fstat(self._lock_fd)
            self._lock_size = status.st_size
            if identity(status) == identity_at(self._lock_path):
                return
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _is_as_left(self) -> bool:
        """Whether log and lock bear their names still, and nobody has appended. Raises `OSError`."""
        return self._size_under_name() == self._size

    def _size_under_name(self) -> int | None:
        """Of the file; None where log or lock do not bear their names any more, or something could not be synced."""
        status = os.stat(self._path)  # noqa: PTH116  # for every group
        if identity(status) != self._identity:
            return None
        lock = os.fstat(self._lock_fd)
        is_ours = identity(lock) == identity_at(self._lock_path) and lock.st_size == self._settled
        return status.st_size if is_ours else None

    def _has_only_grown(self) -> bool:
        """Take in the few lines that others have appended; False where there is more to do than that."""
        end = self._size_under_name()
        if end is None or not self._environment_stands or not 0 < self._size < end <= self._size + _FEW_BYTES:
            return False
        return not self._losses and self._read_on(end)

    def _catch_up(self) -> None:
        """Learn what others did since: appended, died in the middle of a write, moved the file away."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            status = None
        if status is None or identity(status) != self._identity:
            status = self._open()
        self._write_again()
        if status.st_size != self._size:
            self._read_end(status.st_size)
        notary = self._checkpoints.notary
        if notary is not None and not notary.is_held:
            notary.hold(self.seq, self._root_at)

    def _root_at(self, size: int) -> bytes | None:
        """Of the first `size` lines, as `root_at`. Raises `OSError`."""
        backwards = itertools.chain(lines_backwards(self._fd, self._size), closed_backwards(self._path))
        return root_at(size, self._tree, backwards)

    def _root_near(self, size: int) -> bytes | None:
        """The same without the lock, in microseconds: of the latest groups, and of what others have written since."""
        return self._recent.at(size, () if size <= self.seq else self._leaves_ahead())

    def _leaves_ahead(self) -> Iterator[bytes]:
        """The hashes of the lines behind those that are known, up to one that is just being written."""
        for line in os.pread(self._fd, _FEW_BYTES, self._size).splitlines(keepends=True):
            try:
                yield hash_in(line)
            except BrokenLineError:
                return

    def _hold_anew(self) -> None:
        """It may be another log now than the one that was signed."""
        if self._checkpoints.notary is not None:
            self._checkpoints.notary.is_held = False

    def _is_full(self) -> bool:
        return 0 < self._segment_bytes <= self._size

    def _open(self) -> os.stat_result:
        self._stands_so_far()
        had_one = self._identity is not None
        old, self._fd, self._identity = self._fd, -1, None  # at once: what comes may fail, and is tried again
        if old >= 0:
            os.close(old)
        was_lost = finish_rotation(self._path)
        closed = len(closed_firsts(self._path))
        if was_lost or (had_one and closed <= self._closed):
            _log.warning("%s was removed or replaced; its name now holds something else", self._path)
        if was_lost:
            self._losses.gone()
        self._closed = closed
        if is_foreign(_first_line(self._path)):
            self._move_aside()
        self._fd = open_own(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, FILE_MODE)
        status = os.fstat(self._fd)
        if status.st_size == 0 and self._is_to_last:  # now: others may soon be answered for lines in it
            self._sync_names()
        self._identity = identity(status)
        self._size, self._tree, self._prev = _UNREAD, Frontier(), GENESIS
        self._synced = 0
        self._recent.clear()
        self._checkpoints.stands(0)
        self._hold_anew()
        self._environment_stands = False
        return status

    @property
    def _is_to_last(self) -> bool:
        """Whether anything is to outlive a power loss: with AAL_FSYNC=never what was signed."""
        return self._fsync != "never" or self._checkpoints.notary is not None

    def _sync_names(self) -> None:
        """Of the file, and of its folder, which another may have made and not come to sync."""
        folder = self._path.parent
        sync_folder(folder)
        with contextlib.suppress(PermissionError):  # who may not read it cannot sync it
            sync_folder(folder.parent)

    def _move_aside(self) -> None:
        """Keep what another program logged under this name beside the new chain; a record says so."""
        names = (f"{self._path.name}.before-{number}" for number in itertools.count(1))
        kept = next(name for name in names if not os.path.lexists(self._path.with_name(name)))
        size = self._path.stat().st_size
        self._path.rename(self._path.with_name(kept))
        _log.warning("%s was another program's log; it is kept as %s, and a new chain begins", self._path, kept)
        self._losses.kept(kept, size)

    def _read_end(self, size: int) -> None:
        end = self._sound_end(size)
        is_new = not 0 < self._size <= end or not self._read_on(end)
        if is_new:
            self._stands_so_far()
            self._read_back(end)
            self._miss_what_stood()
        if self._losses:
            self._losses.said(lines_backwards(self._fd, end))
        if end < size:
            self._cut_tail(end, size)
        if is_new or end < size:
            self._owe_kept()
        self._environment_stands = self._environment_stands or self._finds_environment(end)

    def _read_on(self, end: int) -> bool:
        """Take in what others have appended; False where that does not go on from what is known."""
        try:
            return self._take_in(end)
        except BrokenLineError:  # so it was not appended to what is known; who reads back says what is wrong
            return False

    def _take_in(self, end: int) -> bool:
        text = os.pread(self._fd, end - self._size, self._size)
        if not text:
            return True
        if b"\x00" in text or text.find(PREV % self._prev.encode(), 0, text.find(b"\n")) < 0:
            return False
        tree, checkpoint_seq, leaves = self._tree.copy(), None, []
        start = behind = 0
        while behind < len(text):
            start, behind = behind, text.find(b"\n", behind) + 1
            if not behind:
                raise BrokenLineError("torn", "the last line that was read has no end")
            leaf = hash_in(text, start, behind)
            leaves.append(leaf)
            tree.append(leaf)
            if text.startswith(CHECKPOINT_START, start) and parse(text[start:behind])["type"] == TYPE:
                checkpoint_seq = tree.size
        last = check(text[start:])
        if last["seq"] != tree.size:
            return False
        self._recent.add(self._tree, leaves)
        self._size, self._tree, self._prev = end, tree, last["hash"]
        if checkpoint_seq is not None:
            self._checkpoints.stands(checkpoint_seq)
        return True

    def _read_back(self, end: int) -> None:
        """Learn from the end of the file what the ledger is; where that says too little, from the segments before."""
        self._hold_anew()
        tree, prev, checkpoint_seq = Frontier(), GENESIS, 0
        backwards = itertools.chain(lines_backwards(self._fd, end), closed_backwards(self._path))
        if (line := next(backwards, None)) is not None:
            last = check(line)
            prev = last["hash"]
            tree, checkpoint_seq = tree_of(itertools.chain((last,), chained(backwards, last)))
            if tree.size != last["seq"]:
                raise BrokenLineError("seq", f"it says seq {last['seq']}, and {tree.size} lines are there")
        self._size, self._tree, self._prev = end, tree, prev
        self._recent.clear()
        self._checkpoints.stands(checkpoint_seq)

    def _stands_so_far(self) -> None:
        if self.seq:
            self._stood = Last(self.seq, self._prev)

    def _miss_what_stood(self) -> None:
        """Lines that this process has written, or seen, are not taken away by any writer: somebody else did that."""
        if self._stood is not None and not self._holds(self._stood):
            _log.error("%s had line %d of the hash %s, and has it no more", self._path, *self._stood)
            self._losses.gone(self._stood)
        self._stood = None

    def _holds(self, last: Last) -> bool:
        if self.seq <= last.seq:
            return (self.seq, self._prev) == last
        backwards = itertools.chain(lines_backwards(self._fd, self._size), closed_backwards(self._path))
        with contextlib.suppress(BrokenLineError):
            line = next(itertools.islice(backwards, self.seq - last.seq, None), b"")
            return hash_in(line).hex() == last.hash
        return False

    def _sound_end(self, size: int) -> int:
        known = self._size if 0 < self._size <= size else 0
        return tails.sound_end(self._fd, size, known, self._checkpoints.is_kept)

    def _cut_tail(self, end: int, size: int) -> None:
        """Cut off what a writer that is no more left behind; the bytes stay beside the log, and a record says so."""
        tail = os.pread(self._fd, size - end, end)
        kept = tails.keep(self._path, tail, self.seq + 1, sync=self._fsync != "never")
        os.ftruncate(self._fd, end)
        _log.warning("cut %d bytes of unfinished lines off %s; they are in %s", size - end, self._path, kept)

    def _owe_kept(self) -> None:
        """Owe a record of each tail that was cut off here, be it by a process that was killed before it wrote one."""
        for name, size in tails.kept(self._path, self.seq + 1):
            self._losses.kept(name, size)

    def _finds_environment(self, end: int) -> bool:
        """Whether the end of the log holds this environment, so that many short-lived writers do not repeat it."""
        start = max(0, end - _RECENT_BYTES)
        lines = os.pread(self._fd, end - start, start).split(b"\n")
        named = (parse_or_none(line) for line in lines if line.startswith(b'{"environment":{'))
        return any(record and record.get("environment_hash") == self._environment_hash for record in named)

    @contextlib.contextmanager
    def or_cut_back(self) -> Iterator[None]:
        """Where the file system refuses, leave the file as it was before."""
        try:
            yield
        except OSError:
            self._cut_back()
            raise


def write_all(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _first_line(path: Path) -> bytes:
    """Of one file."""
    with contextlib.suppress(FileNotFoundError), open(open_own(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123
        return file.readline()
    return b""
