"""What can go wrong, as a tree: each error has a code, an HTTP status, what was found, and what to do.

ContextError
  NotFoundError      404  NOT_FOUND          no such run, episode, batch, pack
  StaleError         409  STALE              the working set has moved on; `current_seq` says to where
  ExistsError        409  EXISTS             the run is there already, or memory knows an earlier one of its name
  ConflictError      409  CONFLICT           memory has moved on since a batch was proposed; `conflicts` say where
  SchemaError        422  SCHEMA             a document is not what its schema says; `faults` have JSON paths
  LimitError         422  LIMIT              more pinned context, or a larger item, working set or pack, than is allowed
  GateError          403  OUTSIDE_MILESTONE  memory is committed at a milestone only
  PhaseError         403  PHASE              the bus's phase is not one in which this is done
  ForbiddenError     403  FORBIDDEN          a path outside the folder of runs, a foreign web page, or past the bus
  RequestError       400  BAD_REQUEST        what was sent is not one JSON object
  MediaTypeError     415  MEDIA_TYPE         what was sent says neither JSON nor, for an upload, a zip
  MethodError        405  METHOD             an address that does not take this method
  PackError          422  PACK               a resume pack that is not what its manifest says; `file` is which
  TooLargeError      413  TOO_LARGE          a request's body, or a pack that is uploaded
  BrokenError        500  BROKEN             what lies on the disk is not what was written there
  BusyError          503  BUSY               others write for longer than a call waits
  UnreachableError   503  UNREACHABLE        Mem0, which searches a memory, fails; what was committed is committed
"""

from __future__ import annotations

from typing import Any

FAULTS_MOST = 20
"""Of a document, so many are told."""


class ContextError(Exception):
    """`str()` is a sentence for people; `members` are for programs."""

    code = "ERROR"
    status = 500
    hint: str | None = None
    retryable = False
    """Whether the same call may go well a little later."""

    def __init__(self, detail: str, *, hint: str | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.members = members
        if hint is not None:
            self.hint = hint

    def body(self) -> dict[str, Any]:
        """As the HTTP API and the bus have it."""
        return {"ok": False, "error": str(self), "code": self.code, "hint": self.hint, **self.members}


class NotFoundError(ContextError):
    code, status = "NOT_FOUND", 404


class StaleError(ContextError):
    """The patch was made at another state of the working set."""

    code, status = "STALE", 409
    hint = "Read the working set again, and make the patch anew with its _update_seq."

    def __init__(self, expected_seq: int, current_seq: int) -> None:
        detail = f"the patch expects _update_seq {expected_seq}, and the working set is at {current_seq}"
        super().__init__(detail, expected_seq=expected_seq, current_seq=current_seq)
        self.current_seq = current_seq


class ExistsError(ContextError):
    code, status = "EXISTS", 409


class ConflictError(ContextError):
    """A batch whose changes can no longer all be made, so none is."""

    code, status = "CONFLICT", 409
    hint = "Propose anew what is still wanted: the batch stays as it is."


class SchemaError(ContextError):
    """`faults` are `{"path": "$.set.status", "message": ...}`, the first `FAULTS_MOST`.

    A message says which rule is broken and what kind of value breaks it, and never the value: it may be large, or a
    secret, and messages go into ledgers and logs.
    """

    code, status = "SCHEMA", 422

    def __init__(self, artifact: str, faults: list[dict[str, str]]) -> None:
        first = faults[0]
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        super().__init__(
            f"{artifact}: {first['path']}: {first['message']}{more}", artifact=artifact, faults=faults[:FAULTS_MOST]
        )
        self.faults = faults[:FAULTS_MOST]


class LimitError(ContextError):
    code, status = "LIMIT", 422


class GateError(ContextError):
    code, status = "OUTSIDE_MILESTONE", 403
    hint = "Give the batch to a milestone, as memory_batch_id; on the bus, call commit in phase SEAL."


class PhaseError(ContextError):
    code, status = "PHASE", 403


class ForbiddenError(ContextError):
    code, status = "FORBIDDEN", 403


class RequestError(ContextError):
    code, status = "BAD_REQUEST", 400


class MediaTypeError(ContextError):
    code, status = "MEDIA_TYPE", 415
    hint = "Send it with Content-Type: application/json."


class MethodError(ContextError):
    code, status = "METHOD", 405


class PackError(ContextError):
    """`file` is the one in the pack that is wrong, None where it is the pack."""

    code, status = "PACK", 422

    def __init__(self, detail: str, file: str | None = None) -> None:
        super().__init__(detail if file is None else f"{file}: {detail}", file=file)
        self.file = file


class TooLargeError(ContextError):
    code, status = "TOO_LARGE", 413


class BrokenError(ContextError):
    code, status = "BROKEN", 500


class BusyError(ContextError):
    code, status = "BUSY", 503
    hint = "Try again."
    retryable = True


class UnreachableError(ContextError):
    code, status = "UNREACHABLE", 503
    hint = "Try again once it is there."
    retryable = True
