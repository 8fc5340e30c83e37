"""What differs between a recorded result and a new one, and what made it differ. Pure.

Two JSON documents are compared member by member, places in them named by JSON pointers (RFC 6901). Arrays are compared
place by place: what is put in at the front of one makes every place behind it another, which is what its readers see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from bus.schemas import show

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

Factor = Literal["code", "manifest", "environment", "degradation"]
Named = Literal["code", "manifest", "environment", "degradation", "none"]
Control = Literal["recorded", "new", "another"]
"""What the version that made a record gives now: the recorded result, the new one of the other version, or a third."""

FACTORS: tuple[Factor, ...] = get_args(Factor)
CHANGES_MOST = 50
"""Changes that a difference lists; who wants all of a larger one has both documents."""

_OF_THE_OVERLAY = frozenset({"code", "manifest"})
_ABSENT = object()


class Change(NamedTuple):
    """One place at which two documents differ. `was` and `now` are JSON, cut where long; None where nothing is."""

    path: str
    was: str | None
    now: str | None

    def body(self) -> dict[str, Any]:
        return {"path": self.path, "was": self.was, "is": self.now}

    def __str__(self) -> str:
        return f"{self.path or 'all of it'}: {self.was or 'nothing'} -> {self.now or 'nothing'}"


@dataclass(frozen=True, slots=True)
class Difference:
    """The places at which two documents differ, from the top; `is_cut` where there are more than are listed."""

    changes: tuple[Change, ...] = ()
    is_cut: bool = False

    @classmethod
    def of(cls, was: Any, now: Any) -> Difference:  # noqa: ANN401
        """Of two JSON values. Numbers are the same where their RFC 8785 form is, as 1 and 1.0; true is no number."""
        found: list[Change] = []
        for change in _changes(was, now):
            if len(found) == CHANGES_MOST:
                return cls(tuple(found), is_cut=True)
            found.append(change)
        return cls(tuple(found))


@dataclass(frozen=True, slots=True)
class Cause:
    """What made a result another: the factors that may have, or `none` of them; `why` says how that is known."""

    names: tuple[Named, ...]
    why: str

    def body(self) -> dict[str, Any]:
        return asdict(self) | {"names": list(self.names)}

    def __str__(self) -> str:
        return " or ".join(self.names)


def cause(
    differs: Collection[str], *, is_declared: bool, repeats: bool | None = None, control: Control | None = None
) -> Cause:
    """Why the result is another, judged by what else differs and, where they were made, by two experiments.

    `is_declared` is whether the overlay says that it is deterministic. `repeats` is whether a second run gave the new
    result again. `control` is what the version that made the record gives where the new result came from: so neither
    its environment nor its degradation tells the two versions apart.
    """
    factors = tuple(factor for factor in FACTORS if factor in differs)
    if repeats is False:
        return _none("two runs in a row gave different results", is_declared)
    if not factors:
        agreed = ", and two runs agree: it may depend on its state, the time, the network" if repeats else ""
        return _none(f"nothing but the result differs{agreed}", is_declared)
    if control is not None:
        return _tried(factors, control, is_declared)
    return Cause(factors, "nothing else differs" if len(factors) == 1 else "these differ; which of them it is, is open")


def _tried(factors: tuple[Factor, ...], control: Control, is_declared: bool) -> Cause:
    """With the recorded version run again beside the new one."""
    if control == "recorded":
        left, told = [one for one in factors if one in _OF_THE_OVERLAY], "the recorded result"
    else:
        left = [one for one in factors if one not in _OF_THE_OVERLAY]
        told = "the new result, too" if control == "new" else "a third result"
        if control == "another" and left:
            left = list(factors)
    why = f"the version that was recorded now gives {told}"
    return Cause(tuple(left), why) if left else _none(why, is_declared)


def _none(why: str, is_declared: bool) -> Cause:
    says = "not deterministic although it says so" if is_declared else "not deterministic"
    return Cause(("none",), f"{says}: {why}")


def _changes(was: Any, now: Any) -> Iterator[Change]:  # noqa: ANN401
    """In the order of the documents. Without recursion: JSON may be nested deeper than Python calls."""
    left: list[tuple[str, Any, Any]] = [("", was, now)]
    while left:
        path, old, new = left.pop()
        if type(old) is dict and type(new) is dict:
            names = [*old, *(name for name in new if name not in old)]
            inner = [(f"{path}/{_token(one)}", old.get(one, _ABSENT), new.get(one, _ABSENT)) for one in names]
            left.extend(reversed(inner))
        elif type(old) is list and type(new) is list:
            left.extend(reversed([(f"{path}/{at}", *_pair(old, new, at)) for at in range(max(len(old), len(new)))]))
        elif not _is_same(old, new):
            yield Change(path, _json(old), _json(new))


def _token(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _pair(old: list[Any], new: list[Any], at: int) -> tuple[Any, Any]:
    return (old[at] if at < len(old) else _ABSENT), (new[at] if at < len(new) else _ABSENT)


def _is_same(old: Any, new: Any) -> bool:  # noqa: ANN401
    """Of two values that are not both objects, nor both arrays."""
    if isinstance(old, dict | list) or isinstance(new, dict | list):
        return False
    return isinstance(old, bool) == isinstance(new, bool) and bool(old == new)


def _json(value: Any) -> str | None:  # noqa: ANN401
    return None if value is _ABSENT else show(value)
