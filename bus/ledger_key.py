"""The key that checkpoints of the ledger are signed with: a private file of the bus's state, and never among the logs.

What was signed stands: whoever writes another history into the ledger's folder contradicts the notes that others keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus.errors import OperatorError
from bus.notary import Notary
from bus.notes import Signer, new_key
from bus.private_file import PrivateFile

if TYPE_CHECKING:
    from pathlib import Path

FILE = "ledger_key.json"


class _Form:
    name = FILE
    allowed = '{"key": "PRIVATE+KEY+<name>+<id>+<key>"}'
    hint = "Put the key back that was there, or move the file away: then checkpoints are not signed."

    def empty(self) -> str | None:
        return None

    def read(self, document: Any) -> str | None:  # noqa: ANN401
        if not isinstance(document, dict) or document.keys() != {"key"} or not isinstance(document["key"], str):
            raise ValueError("something else")
        Signer.read(document["key"])
        return document["key"]

    def document(self, held: str | None) -> object:
        return {"key": held}


class LedgerKey:
    """The key of a state folder. Read once by whoever writes the ledger: another takes effect at the next start."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._file = PrivateFile(state, _Form())

    def signer(self) -> Signer | None:
        """None where there is no key. Raises `SettingError` where the file cannot be used."""
        text = self._file.get()
        return None if text is None else Signer.read(text)

    def notary(self) -> Notary | None:
        """What signs with it, None where there is no key. Raises as `signer`."""
        signer = self.signer()
        return None if signer is None else Notary(signer, self._state)

    def create(self, name: str) -> Signer:
        """Make a key of this name. Raises `OperatorError` where there is one, `ValueError` for what is no name."""
        text = new_key(name)
        self._file.change(lambda held: _only_first(held, text))
        return Signer.read(text)


def _only_first(held: str | None, text: str) -> str:
    if held is not None:
        hint = f"Who knows its verifier key trusts it. To have another, move {FILE} away and restart the server."
        raise OperatorError("ERR_EXISTS", "there is a key already", hint=hint)
    return text
