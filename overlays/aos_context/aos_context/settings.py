"""How a service is set, by its environment or the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.errors import ContextError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_ROOT = "./runs"
VARIABLES = {
    "AOS_CONTEXT_ROOT": "the folder of runs; else `OVERLAY_STATE`, else `./runs`",
    "AOS_CONTEXT_TESTING": "`1`: `allow_outside_milestone` is honoured",
    "AOS_CONTEXT_HOSTS": "names, with commas between, by which the service is reached beside localhost and addresses",
    "AOS_CONTEXT_ENCODING": ("an encoding of tiktoken (`o200k_base`) to count tokens with; else they are estimated"),
}
"""What an operator may set, and what it sets, as README has it."""
BUS_VARIABLES = frozenset({"OVERLAY_PORT", "OVERLAY_STATE", "OVERLAY_TOKEN"})
"""What the bus sets."""
TRUE, FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}


@dataclass(frozen=True, slots=True)
class Settings:
    root: Path = Path(DEFAULT_ROOT)
    """AOS_CONTEXT_ROOT, else OVERLAY_STATE, which the bus sets: the folder of runs."""
    testing: bool = False
    """AOS_CONTEXT_TESTING: allow_outside_milestone is honoured."""
    on_bus: bool = False
    """OVERLAY_PORT: the bus has started the service, and so its phase SEAL counts."""
    bus_token: str | None = field(default=None, repr=False)
    """OVERLAY_TOKEN: what the bus's requests bring, and nobody else's."""
    hosts: tuple[str, ...] = ()
    """AOS_CONTEXT_HOSTS: by which names, beside those of this machine itself, the service is reached."""
    encoding: str | None = None
    """AOS_CONTEXT_ENCODING: tokens are counted with this encoding of tiktoken, else they are estimated."""
    config: Config = DEFAULT_CONFIG


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Raises `ContextError` for a value that cannot be."""
    testing = environment.get("AOS_CONTEXT_TESTING", "").lower()
    if testing not in TRUE | FALSE:
        raise ContextError(f"AOS_CONTEXT_TESTING is {testing!r}; allowed: 1 or 0")
    root = environment.get("AOS_CONTEXT_ROOT") or environment.get("OVERLAY_STATE") or DEFAULT_ROOT
    hosts = environment.get("AOS_CONTEXT_HOSTS", "").split(",")
    return Settings(
        root=Path(root),
        testing=testing in TRUE,
        on_bus="OVERLAY_PORT" in environment,
        bus_token=environment.get("OVERLAY_TOKEN") or None,
        hosts=tuple(host.strip().lower() for host in hosts if host.strip()),
        encoding=environment.get("AOS_CONTEXT_ENCODING") or None,
    )
