"""Who may do what: every cell of the table, and what an op may need beyond it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bus.errors import DeniedError
from bus.model import Permission, Phase
from bus.policy import PHASES, authorize, replay_needs_consent, service_rights
from runners.base import Rights
from tests.support import a_capability, a_manifest

ANALYSIS, EXEC = Permission.ANALYSIS, Permission.EXEC

TABLE = [
    (Phase.OPEN, ANALYSIS, Rights(write=True, network=True, exec=False)),
    (Phase.ALIGN, ANALYSIS, Rights(write=True, network=True, exec=False)),
    (Phase.ASCEND, EXEC, Rights(write=True, network=True, exec=True)),
    (Phase.CLEAR, ANALYSIS, Rights(write=False, network=False, exec=False)),
    (Phase.SEAL, ANALYSIS, Rights(write=True, network=False, exec=False)),
]
HELD = [frozenset(), frozenset({ANALYSIS}), frozenset({EXEC}), frozenset({ANALYSIS, EXEC})]
HELD_IDS = ["none", "analysis", "exec", "both"]


def test_the_table_of_phases_is_complete_and_cannot_be_changed() -> None:
    assert set(PHASES) == {row[0] for row in TABLE} == set(Phase)
    with pytest.raises(TypeError):
        PHASES[Phase.CLEAR] = PHASES[Phase.ASCEND]  # type: ignore[index]


@pytest.mark.parametrize("held", HELD, ids=HELD_IDS)
@pytest.mark.parametrize(("phase", "needs", "rights"), TABLE, ids=[row[0].value for row in TABLE])
def test_a_phase_gives_its_rights_to_whoever_holds_its_permission_and_to_nobody_else(
    phase: Phase, needs: Permission, rights: Rights, held: frozenset[Permission]
) -> None:
    manifest = a_manifest(permissions=held)
    if needs in held:
        assert authorize(manifest, a_capability(), phase, {}) == rights
    else:
        with pytest.raises(DeniedError) as refusal:
            authorize(manifest, a_capability(), phase, {})
        assert refusal.value.code == "ERR_PERMISSION_DENIED"
        assert f"'{needs}'" in refusal.value.detail


def test_ascend_without_exec_names_exec_even_where_the_phase_is_not_served_either() -> None:
    manifest = a_manifest(permissions=frozenset({ANALYSIS}))
    with pytest.raises(DeniedError, match="phase ASCEND needs permission 'exec'; echo holds analysis"):
        authorize(manifest, a_capability(phases=(Phase.OPEN,)), Phase.ASCEND, {})


@pytest.mark.parametrize("phase", Phase)
def test_a_capability_answers_only_in_its_own_phases(phase: Phase) -> None:
    capability = a_capability(phases=tuple(other for other in Phase if other is not phase))
    with pytest.raises(DeniedError, match=f"does not serve phase {phase}; it serves ") as refusal:
        authorize(a_manifest(), capability, phase, {})
    assert refusal.value.code == "ERR_PHASE_DENIED"


def test_a_capability_without_phases_is_never_called() -> None:
    with pytest.raises(DeniedError, match="it serves none"):
        authorize(a_manifest(), a_capability(phases=()), Phase.OPEN, {})


OP_POLICY = {"read": ("analysis",), "start": ("exec",), "both": ("analysis", "exec"), "free": ()}


@pytest.mark.parametrize(
    ("op", "held", "allowed"),
    [
        ("read", HELD[1], True),
        ("start", HELD[1], False),
        ("both", HELD[1], False),
        ("start", HELD[3], True),
        ("both", HELD[3], True),
        ("free", HELD[1], True),
    ],
)
def test_a_listed_op_needs_the_permissions_that_are_listed(op: str, held: frozenset[Permission], allowed: bool) -> None:
    manifest = a_manifest(permissions=held, op_policy=OP_POLICY)
    if allowed:
        assert authorize(manifest, a_capability(), Phase.OPEN, {"op": op}).write
    else:
        with pytest.raises(DeniedError, match=f"op \"{op}\" needs permission 'exec'"):
            authorize(manifest, a_capability(), Phase.OPEN, {"op": op})


@pytest.mark.parametrize("op", ["", "READ", "read ", "unknown", None, 1, True, ["read"], {"read": 1}])
def test_an_op_that_is_not_listed_or_no_text_is_denied(op: object) -> None:
    with pytest.raises(DeniedError, match="is not in the op_policy of echo: both, free, read, start") as refusal:
        authorize(a_manifest(op_policy=OP_POLICY), a_capability(), Phase.OPEN, {"op": op})
    assert refusal.value.code == "ERR_PERMISSION_DENIED"


def test_an_empty_op_policy_denies_every_op() -> None:
    with pytest.raises(DeniedError, match="op_policy of echo: none"):
        authorize(a_manifest(op_policy={}), a_capability(), Phase.OPEN, {"op": "read"})


@pytest.mark.parametrize(("op_policy", "payload"), [(OP_POLICY, {"text": "x"}), (None, {"op": "whatever"})])
def test_without_an_op_or_without_an_op_policy_the_phase_decides(
    op_policy: dict[str, tuple[str, ...]] | None, payload: dict[str, str]
) -> None:
    assert authorize(a_manifest(op_policy=op_policy), a_capability(), Phase.OPEN, payload).write


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("network", [True, False, (443,)])
def test_a_capability_can_give_up_the_network_and_never_gain_it(phase: Phase, network: bool | tuple[int, ...]) -> None:
    rights = authorize(a_manifest(), a_capability(network=network), phase, {})
    assert rights.network == (network if PHASES[phase].network else False)


@pytest.mark.parametrize("phase", Phase)
def test_paths_to_write_are_given_only_where_the_phase_writes(phase: Phase) -> None:
    capability = a_capability(read_paths=("/data",), write_paths=("/out",))
    rights = authorize(a_manifest(), capability, phase, {})
    assert rights.read_paths == ("/data",)
    assert rights.write_paths == (() if phase is Phase.CLEAR else ("/out",))


@pytest.mark.parametrize("phase", Phase)
def test_what_any_call_of_the_overlay_may_write_is_known_to_each(phase: Phase) -> None:
    offered = [
        a_capability(name="none"),
        a_capability(name="one", write_paths=("/out", "/more")),
        a_capability(name="two", write_paths=("/out",)),
    ]
    held = a_manifest(capabilities={one.name: one for one in offered})
    for capability in offered:
        assert authorize(held, capability, phase, {}).own_paths == ("/out", "/more")
    assert service_rights(held).own_paths == ("/out", "/more")


def test_a_service_has_the_rights_of_all_its_phases_and_capabilities() -> None:
    closed = a_capability(name="closed", phases=(Phase.CLEAR, Phase.SEAL), read_paths=("/data",), network=False)
    narrow = a_capability(name="narrow", phases=(Phase.OPEN,), network=(443,), write_paths=("/out",))
    other = a_capability(name="other", phases=(Phase.ALIGN, Phase.ASCEND), network=(80, 443))  # no exec: no ASCEND
    held = a_manifest(
        permissions=frozenset({ANALYSIS}), capabilities={one.name: one for one in (closed, narrow, other)}
    )
    assert service_rights(held) == Rights(
        write=True,
        network=(80, 443),
        exec=False,
        read_paths=("/data",),
        write_paths=("/out",),
        own_paths=("/out",),
    )
    silent = replace(held, capabilities={"closed": replace(closed, phases=(Phase.CLEAR,))})
    assert service_rights(silent) == Rights(read_paths=("/data",))
    anything = replace(
        held, permissions=frozenset({EXEC, ANALYSIS}), capabilities={"other": replace(other, network=True)}
    )
    assert service_rights(anything) == Rights(write=True, network=True, exec=True)


@pytest.mark.parametrize("phase", Phase)
def test_a_replay_asks_first_where_the_phase_writes_and_the_result_is_open(phase: Phase) -> None:
    assert replay_needs_consent(phase, deterministic=False) is (phase is not Phase.CLEAR)
    assert not replay_needs_consent(phase, deterministic=True)
