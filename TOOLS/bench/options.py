"""The arguments of the bench, and the plan that they make on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import peers
from layout import BenchError, has_cc
from targets import BESIDE_PEERS, PEERS, TARGETS, WITHOUT_PEERS, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from targets import Target

CONNECTIONS = (1, 16, 64)
CONNECTIONS_OF_PEERS = (1, 16)
CONNECTIONS_OF_A_SIEGE = 16


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Measure the bus beside what people would use instead."
    )
    parser.add_argument("--seconds", type=_above_zero(float), default=3.0, help="length of one measurement")
    parser.add_argument("--runs", type=_above_zero(int), default=3, help="rounds")
    parser.add_argument("--connections", type=_counts, help="as 1,16,64")
    parser.add_argument("--only", type=_names, default=None, help=f"some of {', '.join(t.name for t in TARGETS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="measure webhook and lighttpd too (fetched with apt-get where they are missing), and judge by the goals",
    )
    parser.add_argument(
        "--crowd", type=_at_least_zero, metavar="N", help="the overlays of the bus whose memory is measured (100)"
    )
    parser.add_argument(
        "--hostile", action="store_true", help="what honest clients keep beside as many hostile ones instead"
    )
    parser.add_argument(
        "--memory", action="store_true", help="calls that share too little memory, under several policies, instead"
    )
    parser.add_argument("--seed", type=int, default=1, help="of --memory: what the calls' sizes are drawn by")
    parser.add_argument("--soak", type=_above_zero(float), metavar="MINUTES", help="a steady rate for so long instead")
    parser.add_argument("--rate", type=_above_zero(float), help="of --soak: calls a second, not the highest that holds")
    parser.add_argument("--every", type=_above_zero(float), default=10.0, help="of --soak: seconds between two lines")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="of --soak: write its lines as CSV")
    return parser.parse_args(argv)


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}, allowed: above 0")
        return value

    return read


def _at_least_zero(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}, allowed: 0 or more")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(_above_zero(int)(part)) for part in text.split(",")))


def _names(text: str) -> frozenset[str]:
    names = frozenset(text.split(","))
    known = {target.name for target in TARGETS}
    if unknown := sorted(names - known):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown, allowed: {', '.join(sorted(known))}")
    return names


def plan_of(given: argparse.Namespace, folder: Path) -> Plan:
    """What to measure; what this machine cannot run is left out with a note. Peers are fetched into `folder`."""
    chosen = _chosen(given)
    found, missing = _find_peers(chosen, folder)
    if not has_cc():
        missing["c"] = "there is no C compiler (cc)"
    why = {t.name: missing.get(t.server or "") or missing.get(t.program or "") for t in chosen}
    targets = [target for target in chosen if not why[target.name]]
    notes = [f"{name} was left out: {reason}" for name, reason in why.items() if reason]
    if not targets:
        raise BenchError("nothing to measure: " + "; ".join(notes))
    return Plan(
        targets,
        given.connections or (CONNECTIONS_OF_PEERS if given.peers else CONNECTIONS),
        given.seconds,
        given.runs,
        notes,
        found,
        crowd=_crowd(given),
        judged=given.peers,
    )


def _chosen(given: argparse.Namespace) -> list[Target]:
    if given.only is not None:
        return [target for target in TARGETS if target.name in given.only]
    return list(BESIDE_PEERS if given.peers else WITHOUT_PEERS)


def _crowd(given: argparse.Namespace) -> int:
    """Part of a whole run beside the peers; else where it is asked for."""
    if given.crowd is not None:
        return int(given.crowd)
    return 100 if given.peers and given.only is None else 0


def _find_peers(chosen: Sequence[Target], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The peers' programs by name, and why the others are missing."""
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name in sorted(PEERS & {target.server for target in chosen}):
        try:
            found[name] = peers.find(name, folder)
        except BenchError as error:
            missing[name] = str(error)
    return found, missing
