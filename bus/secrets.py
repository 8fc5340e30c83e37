"""Secrets: values that the operator lets named overlays have, as environment variables of their programs.

A secret is set with `aal secret set`, kept in `<state>/secrets.json` by its value or by the environment variable that
has it, or declared in `aal.toml` by its variable; one that stands in both is what `aal.toml` says. No value is ever in
an argument, an error, a log or a record: messages have names only, and what overlays write is redacted.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from bus.errors import DeniedError, Fault, OperatorError, SettingError, say
from bus.private_file import PrivateFile
from bus.redaction import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from bus.settings import DeclaredSecret

FILE = "secrets.json"
VALUE_LIMIT = 64 * 1024
"""Bytes of a value. The kernel takes 128 KiB for a variable with its name (MAX_ARG_STRLEN, execve(2))."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_OVERLAY = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_OURS = ("AAL_", "OVERLAY_", "PYTHON", "LD_")
_OURS_WHOLE = frozenset({"PATH", "HOME", "TMPDIR", "BASH_ENV", "ENV", "IFS"})


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret: its `value`, or the environment variable `env` that has it, and who may have it.

    `is_declared` tells that it stands in `aal.toml`.
    """

    name: str
    overlays: frozenset[str]
    env: str | None = None
    value: str | None = field(default=None, repr=False)
    is_declared: bool = False

    @classmethod
    def read(cls, name: str, document: Any) -> Self:  # noqa: ANN401
        """Of its JSON. Raises `ValueError`, which repeats nothing but names."""
        read_name(name)
        if not isinstance(document, dict) or document.keys() not in ({"overlays", "value"}, {"overlays", "env"}):
            raise ValueError(f"the secret {name} without overlays and one of value and env")
        overlays, env, value = document["overlays"], document.get("env"), document.get("value")
        if not isinstance(overlays, list):
            raise ValueError(f"overlays of the secret {name} that are no list")  # noqa: TRY004  # one class for all
        return cls(
            name,
            frozenset(map(read_overlay, overlays)),
            None if env is None else read_variable(env),
            None if value is None else read_value(value),
        )

    def document(self) -> dict[str, Any]:
        source = {"value": self.value} if self.env is None else {"env": self.env}
        return source | {"overlays": sorted(self.overlays)}

    def shown(self) -> dict[str, Any]:
        """What people and programs are shown of it: never the value."""
        source = "aal.toml" if self.is_declared else FILE
        return {"name": self.name, "source": source, "env": self.env, "overlays": sorted(self.overlays)}

    def current(self, env: Mapping[str, str]) -> str | None:
        """Its value now, None where its variable is not set or empty."""
        return self.value if self.env is None else env.get(self.env) or None


class SecretFile:
    """The form of the file: `{"secrets": {NAME: {"value"|"env": text, "overlays": [names]}}}`."""

    name = FILE
    allowed = '{"secrets": {as aal secret set writes them}}'
    hint = "Mend the file, or delete it and set its secrets anew."

    def empty(self) -> dict[str, Secret]:
        return {}

    def read(self, document: Any) -> dict[str, Secret]:  # noqa: ANN401
        if not isinstance(document, dict) or document.keys() != {"secrets"}:
            raise ValueError("something else")
        if not isinstance(document["secrets"], dict):
            raise ValueError("secrets that are no object")  # noqa: TRY004  # one class for all
        return {name: Secret.read(name, secret) for name, secret in document["secrets"].items()}

    def document(self, held: dict[str, Secret]) -> object:
        return {"secrets": {name: held[name].document() for name in sorted(held)}}


class Secrets:
    """The secrets of one state folder and of the `[secrets]` of `aal.toml`.

    Raises `SettingError` for what is declared and cannot be, and so does each method that looks at the file where that
    makes no sense. `redactor` never looks: it knows the values that the looks before have found, and no overlay is
    given one without a look.
    """

    def __init__(
        self, state: Path, declared: Iterable[DeclaredSecret] = (), *, env: Mapping[str, str] = os.environ
    ) -> None:
        self._file = PrivateFile(state, SecretFile())
        self._declared = _read_declared(declared)
        self._env = env
        self._kept: dict[str, Secret] | None = None
        self._secrets: dict[str, Secret] = {}
        self._values: dict[str, str | None] = {}
        self._changes = 0
        self.redactor = Redactor()

    # --- For the bus ---

    def for_overlay(self, overlay: str, wanted: Iterable[str]) -> dict[str, str]:
        """The values of the `wanted` secrets by their names, for the environment of the overlay's programs.

        Raises `DeniedError` (ERR_SECRET) that names each that is not set or not the overlay's.
        """
        names = list(wanted)
        if names:
            self._look()
        refused = "; ".join(filter(None, (self._why_not(overlay, name) for name in names)))
        if refused:
            raise DeniedError("ERR_SECRET", refused)
        return {name: value for name in names if (value := self._values[name]) is not None}

    def stamp(self) -> int:
        """A number that grows whenever a value may have changed, or who may have it."""
        self._look()
        return self._changes

    def withheld(self) -> frozenset[str]:
        """The environment variables that are secrets: an overlay gets none of them because it names the variable.

        Of a secret that is kept by its value it is the variable of its name, which the bus may well have, too.
        """
        self._look()
        return frozenset(secret.env or secret.name for secret in self._secrets.values())

    def redact(self, text: str) -> str:
        """`text` with `[secret NAME]` in the place of each value; `redactor` does so for bytes and JSON."""
        return self.redactor.text(text)

    # --- For the operator ---

    def all(self) -> list[Secret]:
        """Every secret, by name."""
        self._look()
        return [self._secrets[name] for name in sorted(self._secrets)]

    def set(self, name: str, overlays: Iterable[str] = (), *, value: str | None = None, env: str | None = None) -> None:
        """Give a secret its value, or the variable that has it. Those who may have it already still may.

        Raises `OperatorError` for one that `aal.toml` declares.
        """
        self._require_kept(name)

        def put(kept: dict[str, Secret]) -> dict[str, Secret]:
            before = kept[name].overlays if name in kept else frozenset()
            return kept | {name: Secret(name, before | frozenset(overlays), env, value)}

        self._file.change(put)

    def allow(self, name: str, overlay: str) -> None:
        """Let an overlay have a secret. Raises `OperatorError` where there is none, or `aal.toml` declares it."""
        self._change(name, lambda secret: replace(secret, overlays=secret.overlays | {overlay}))

    def deny(self, name: str, overlay: str) -> None:
        """Let an overlay no longer have a secret. Raises as `allow`."""
        self._change(name, lambda secret: replace(secret, overlays=secret.overlays - {overlay}))

    def remove(self, name: str) -> None:
        """Forget a secret. Raises as `allow`."""
        self._change(name, lambda _: None)

    def _change(self, name: str, change: Callable[[Secret], Secret | None]) -> None:
        self._require_kept(name)

        def apply(kept: dict[str, Secret]) -> dict[str, Secret]:
            if name not in kept:
                hint = "aal secret list shows those that there are."
                raise OperatorError("ERR_NOT_FOUND", f"there is no secret {name}", hint=hint)
            changed = change(kept[name])
            return {**kept, name: changed} if changed else {other: kept[other] for other in kept if other != name}

        self._file.change(apply)

    def _require_kept(self, name: str) -> None:
        if name in self._declared:
            detail = f"the secret {name} stands in aal.toml"
            raise OperatorError("ERR_EXISTS", detail, hint="Change it there, under [secrets].")

    # --- The look ---

    def _look(self) -> None:
        """Read the file again where it has changed, and the variables; learn what is new."""
        kept = self._file.get()
        if kept is not self._kept:
            self._kept, self._secrets = kept, kept | self._declared
            self._changes += 1
        values = {name: secret.current(self._env) for name, secret in self._secrets.items()}
        if values != self._values:
            self._values = values
            self._changes += 1
            self.redactor.learn((name, value) for name, value in values.items() if value is not None)

    def _why_not(self, overlay: str, name: str) -> str | None:
        secret = self._secrets.get(name)
        if secret is None:
            return f"the secret {name} is not set"
        if overlay not in secret.overlays:
            return f"the secret {name} is not allowed to {overlay}"
        if self._values[name] is None:
            return f"the environment variable {secret.env} of the secret {name} is not set"
        return None


def _read_declared(declared: Iterable[DeclaredSecret]) -> dict[str, Secret]:
    found: dict[str, Secret] = {}
    faults: list[Fault] = []
    for one in declared:
        try:
            overlays = frozenset(map(read_overlay, one.overlays))
            found[one.name] = Secret(read_name(one.name), overlays, read_variable(one.env), is_declared=True)
        except ValueError as error:
            faults.append(Fault(f"aal.toml: secrets.{one.name}", str(error), "names of a variable and of overlays"))
    if faults:
        raise SettingError("ERR_SETTING", say(faults), faults=faults)
    return found


def read_name(text: str) -> str:
    """The name of a secret, which is that of a variable too. Raises `ValueError`, as the following do."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text[:80]!r} does not match {_NAME.pattern}")
    if text in _OURS_WHOLE or text.startswith(_OURS):
        raise ValueError(f"{text} is a variable that has another meaning to programs")
    return text


def read_variable(text: Any) -> str:  # noqa: ANN401
    """The name of an environment variable of the bus."""
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ValueError("a variable whose name is none")  # not repeated: it may be the value, by mistake
    return text


def read_overlay(text: Any) -> str:  # noqa: ANN401
    """The name of an overlay that may have a secret."""
    if not isinstance(text, str) or not _OVERLAY.fullmatch(text):
        raise ValueError(f"what is no name of an overlay, which matches {_OVERLAY.pattern}")  # not repeated, as above
    return text


def read_value(text: Any) -> str:  # noqa: ANN401
    """A value that a variable can hold."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("a value that is empty, or has a NUL, or is no text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("a value that is not UTF-8") from None
    if size > VALUE_LIMIT:
        raise ValueError(f"a value of {size} bytes; {VALUE_LIMIT} are allowed")
    return text
