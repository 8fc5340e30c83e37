"""What the ledger of a run says of its memory and its episodes, so far as it was looked at: no line twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aos_context.artifacts import Document
    from aos_context.ledger import FileLedger

NOTED_EVENTS = frozenset({"MEMORY_PROPOSED", "MEMORY_COMMITTED", "EPISODE_CREATED", "RESUME_PACK_LOADED"})


class Noted:
    """Used under the run's lock, without which nobody writes events of these types."""

    def __init__(self, ledger: FileLedger) -> None:
        self._ledger = ledger
        self._seq = 0
        """Up to this line all is known; there is no gap before it."""
        self.proposed: set[str] = set()
        """Batches of this run. Those before RESUME_PACK_LOADED are the packed run's, in whose store they lie."""
        self.committed: dict[str, int] = {}
        """Batches, and in which line they were committed."""
        self.episode = 0
        """The number of the last one; 0 without any."""
        self.episode_seq = 0
        """In which line that was created."""
        self.requests: dict[str, int] = {}
        """The numbers of the episodes that were asked for with a `request_id`, by that."""
        self.brought: Document | None = None
        """Of the proposal of what the pack remembers that this run was loaded from; None before it, or without any."""

    def catch_up(self) -> None:
        """Look at the lines that others have written, too. Raises `BrokenError`."""
        with self._ledger.locked():  # an event on its way may be taken back, and its number be another's
            last = self._ledger.last_seq()
        for event in reversed(list(self._ledger.read_back(NOTED_EVENTS, self._seq))):
            if event["seq"] <= last:
                self._take(event)
        self._seq = last

    def add(self, event: Document) -> None:
        """One that was just written; what lies between is looked at when it is caught up with."""
        self._take(event)
        if event["seq"] == self._seq + 1:
            self._seq = event["seq"]

    def _take(self, event: Document) -> None:
        data = event["data"]
        if event["event_type"] == "MEMORY_PROPOSED":
            self.proposed.add(data["batch_id"])
            self.brought = data if "pack" in data else self.brought
        elif event["event_type"] == "MEMORY_COMMITTED":
            self.committed.setdefault(data["batch_id"], event["seq"])
        elif event["event_type"] == "EPISODE_CREATED":
            self.episode, self.episode_seq = data["number"], event["seq"]
            if data["request_id"] is not None:
                self.requests[data["request_id"]] = data["number"]
        elif event["event_type"] == "RESUME_PACK_LOADED":
            self.proposed, self.committed, self.brought = set(), {}, None
