"""Phases times permissions, as one table, and the one function that reads it. Pure; what is not allowed is denied."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bus.errors import DeniedError
from bus.model import Permission, Phase
from bus.schemas import show
from runners.base import Rights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bus.model import Capability, Manifest


@dataclass(frozen=True, slots=True)
class PhaseRule:
    """What a phase asks of an overlay, and the rights that it gives a call. Scratch is writable in every phase."""

    needs: Permission
    write: bool
    network: bool
    exec: bool


PHASES: Mapping[Phase, PhaseRule] = MappingProxyType(
    {
        Phase.OPEN: PhaseRule(Permission.ANALYSIS, write=True, network=True, exec=False),
        Phase.ALIGN: PhaseRule(Permission.ANALYSIS, write=True, network=True, exec=False),
        Phase.ASCEND: PhaseRule(Permission.EXEC, write=True, network=True, exec=True),
        Phase.CLEAR: PhaseRule(Permission.ANALYSIS, write=False, network=False, exec=False),
        Phase.SEAL: PhaseRule(Permission.ANALYSIS, write=True, network=False, exec=False),
    }
)


def authorize(manifest: Manifest, capability: Capability, phase: Phase, payload: Mapping[str, Any]) -> Rights:
    """The rights of one call. Raises `DeniedError`, whose detail names the permission or phase that is missing.

    The permission is judged before the phase: an overlay that could never be called in ASCEND should say why.
    """
    rule = PHASES[phase]
    if rule.needs not in manifest.permissions:
        raise _lacks(manifest, [rule.needs], f"phase {phase}")
    if phase not in capability.phases:
        served = ", ".join(capability.phases) or "none"
        raise DeniedError(
            "ERR_PHASE_DENIED", f"{manifest.name}.{capability.name} does not serve phase {phase}; it serves {served}"
        )
    if manifest.op_policy is not None and "op" in payload:
        _authorize_op(manifest, manifest.op_policy, payload["op"])
    return _rights(rule, manifest, capability)


def service_rights(manifest: Manifest) -> Rights:
    """What the one process needs that answers all calls of an overlay: the union over its capabilities and phases."""
    given = [rights for _, rights in in_use(manifest)]
    ports = {port for rights in given if isinstance(rights.network, tuple) for port in rights.network}
    return Rights(
        write=any(rights.write for rights in given),
        network=any(rights.network is True for rights in given) or tuple(sorted(ports)) or False,
        exec=any(rights.exec for rights in given),
        read_paths=_union(rights.read_paths for rights in given),
        write_paths=_union(rights.write_paths for rights in given),
        gpu=manifest.prefers_gpu,
        own_paths=manifest.own_paths,
    )


def in_use(manifest: Manifest) -> Iterator[tuple[Capability, Rights]]:
    """Each of its capabilities with what that has in each of its phases."""
    for capability in manifest.capabilities.values():
        for phase in capability.phases:
            if PHASES[phase].needs in manifest.permissions:
                yield capability, _rights(PHASES[phase], manifest, capability)


def _rights(rule: PhaseRule, manifest: Manifest, capability: Capability) -> Rights:
    """What the phase gives, narrowed by what the manifest asks for."""
    return Rights(
        write=rule.write,
        network=capability.network if rule.network else False,
        exec=rule.exec,
        read_paths=capability.read_paths,
        write_paths=capability.write_paths if rule.write else (),
        gpu=manifest.prefers_gpu,
        own_paths=manifest.own_paths,
    )


def _union(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for some in paths for path in some))


def replay_needs_consent(phase: Phase, *, deterministic: bool) -> bool:
    """Whether to run a recorded call again could change something."""
    rule = PHASES[phase]
    return (rule.write or rule.exec) and not deterministic


def _authorize_op(manifest: Manifest, op_policy: Mapping[str, tuple[str, ...]], op: object) -> None:
    needs = op_policy.get(op) if isinstance(op, str) else None
    if needs is None:
        listed = ", ".join(sorted(op_policy)) or "none"
        raise DeniedError(
            "ERR_PERMISSION_DENIED", f"op {show(op)} is not in the op_policy of {manifest.name}: {listed}"
        )
    if missing := [permission for permission in needs if permission not in manifest.permissions]:
        raise _lacks(manifest, missing, f"op {show(op)}")


def _lacks(manifest: Manifest, missing: Iterable[str], what: str) -> DeniedError:
    held = ", ".join(sorted(manifest.permissions)) or "none"
    wanted = ", ".join(f"'{permission}'" for permission in missing)
    return DeniedError("ERR_PERMISSION_DENIED", f"{what} needs permission {wanted}; {manifest.name} holds {held}")
