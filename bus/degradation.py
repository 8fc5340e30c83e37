"""Degradation: what a call is told to do without while memory is short, as the rune and the manifest have it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bus.canonical import figure

if TYPE_CHECKING:
    from bus.model import Degradation
    from bus.runes import KvRule, MemoryProfile, Step

_LEAST = 0.001
"""The smallest shrink factor that three decimals can say; a factor of 0 would leave nothing to shrink."""


def memory_block(
    profile: MemoryProfile, stress: float, *, all_steps: bool, degradation: Degradation, total_mb: int
) -> dict[str, Any]:
    """The envelope's `memory` for a call admitted at this stress. Pure: the same figures give the same block.

    Above a stress of 0.3 + 0.05 x priority the profile's steps apply in order, the more of them the nearer stress is to
    1.0, or at once with `all_steps`; `degradation` is what the manifest adds then. `total_mb` is the memory that
    `kv.cap_mb` is a share of. Figures are whole or have at most three decimals.
    """
    level = _thousandths(stress)
    is_degraded = level > _threshold(profile)
    steps = _steps_at(profile, level, all_steps=all_steps) if is_degraded else ()
    effects = _effects(steps) if steps else {}
    block: dict[str, Any] = {
        "profile": profile.name or "custom",
        "soft_mb": profile.soft_mb,
        "hard_mb": profile.hard_mb,
        "tier": profile.tier,
        "stress": figure(level / 1000),
        "applied": [str(step) for step in steps],
        **effects,
    }
    if is_degraded:
        block |= _manifest_effects(degradation)
    if profile.kv:
        block["kv"] = _kv_block(profile.kv, total_mb, effects.get("kv_shrink_factor", 1))
    return block


def _thousandths(stress: float) -> int:
    """Stress as it will stand in the record, whole, so that counting steps has no rounding of its own."""
    return round(1000 * min(1.0, max(0.0, stress)))


def _threshold(profile: MemoryProfile) -> int:
    """The stress above which a profile degrades, in thousandths."""
    return 300 + 50 * profile.priority


def _steps_at(profile: MemoryProfile, level: int, *, all_steps: bool) -> tuple[Step, ...]:
    """The steps that apply above the threshold: the first ceil(n x (stress - threshold) / (1 - threshold)) of n."""
    if all_steps:
        return profile.steps
    threshold = _threshold(profile)
    return profile.steps[: -(-len(profile.steps) * (level - threshold) // (1000 - threshold))]


def _effects(steps: tuple[Step, ...]) -> dict[str, Any]:
    """What the overlay is told of the steps: factors multiply, the smallest context counts, features add up."""
    by_action: dict[str, list[Any]] = {}
    for step in steps:
        by_action.setdefault(step.action, []).append(step.value)
    effects: dict[str, Any] = {}
    if factors := by_action.get("SHRINK_KV"):
        effects["kv_shrink_factor"] = figure(max(_LEAST, math.prod(factors)))
    if contexts := by_action.get("CONTEXT"):
        effects["max_context_tokens"] = min(contexts)
    if features := by_action.get("DISABLE"):
        effects["disabled_features"] = list(dict.fromkeys(features))
    if modes := by_action.get("BATCH"):
        effects["batch_mode"] = modes[-1]
    if tiers := by_action.get("OFFLOAD"):
        effects["offload_tier"] = tiers[-1]
    return effects


def _manifest_effects(degradation: Degradation) -> dict[str, Any]:
    effects: dict[str, Any] = {}
    if degradation.max_fraction is not None:
        effects["max_fraction"] = figure(degradation.max_fraction)
    if degradation.disable_nonessential:
        effects["disable_nonessential"] = True
    return effects


def _kv_block(rule: KvRule, total_mb: int, factor: float) -> dict[str, Any]:
    return {"cap_mb": round(rule.cap * total_mb * factor), "policy": rule.policy, "purge": rule.purge}
