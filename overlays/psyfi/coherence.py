"""How an ensemble of qubits loses its coherence: Bloch equations under noise, integrated with Runge-Kutta steps.

Each qubit starts in the equal superposition. In the rotating frame its transverse Bloch vector s = x + iy and its
inversion z follow

    ds/dt = (i delta(t) - 1/T2) s        dz/dt = (z_eq - z) / T1        1/T2 = 1 / (2 T1) + 1/T_phi

(Bloch 1946, Physical Review 70: 460-474). Its detuning delta(t) is an Ornstein-Uhlenbeck process: `detuning` on
average, `spread` its standard deviation, `correlation_time` its memory (absent: it keeps its first value). Without
pulses the ensemble's coherence is known in closed form, |<s(t)>| = exp(-t/T2 - chi(t)) with

    chi(t) = spread^2 tau^2 (exp(-t/tau) + t/tau - 1), or spread^2 t^2 / 2 for a detuning that stays

(Anderson and Weiss 1953, Reviews of Modern Physics 25: 269-276; Kubo 1954), which is given beside the simulated curve.
`echo` turns every qubit at half time (Hahn 1950, Physical Review 80: 580-594): what stayed is undone at the end.

Times are in one unit of the caller's choice, rates in radians per that unit.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

RATE_STEP = 0.1
"""Largest step, in units of the fastest rate: the local error of a step is about RATE_STEP^5 / 120, below 1e-7."""

MAX_STEPS = 2_000_000
"""Steps of all members together; some seconds of one core, and under 100 MB."""

SIGNIFICANT = 6
EDGE = 2.0**-54
"""Nearest that a share comes to 0 or 1, where the normal distribution has no quantile."""

SLOW = 1e-6
"""Below this t/tau the detuning stays, to within a millionth; the exact formula would cancel to nothing."""


class BadParameter(ValueError):  # noqa: N818  the caller's mistake, not an error of this program
    """A parameter that cannot be; the message names it, the value found and what is allowed."""


@dataclass(frozen=True)
class Parameters:
    """One simulation. `points` is the number of times on the curve, `members` that of qubits."""

    duration: float = 100.0
    t1: float = 80.0
    t_phi: float = 60.0
    detuning: float = 0.1
    spread: float = 0.02
    correlation_time: float | None = None
    sequence: str = "ramsey"
    equilibrium: float = 1.0
    members: int = 200
    points: int = 101

    @property
    def decay_rate(self) -> float:
        """1/T2."""
        return 0.5 / self.t1 + 1 / self.t_phi

    @property
    def steps_per_point(self) -> int:
        fastest = max(self.decay_rate, 1 / self.t1, abs(self.detuning) + 5 * self.spread)
        if self.correlation_time is not None:
            fastest = max(fastest, 1 / self.correlation_time)
        return max(1, math.ceil(self.duration * fastest / RATE_STEP / (self.points - 1)))

    @property
    def total_steps(self) -> int:
        return self.members * self.steps_per_point * (self.points - 1)


_RANGES: dict[str, tuple[float, float]] = {
    "duration": (1e-9, 1e9), "t1": (1e-9, 1e12), "t_phi": (1e-9, 1e12), "detuning": (-1e9, 1e9), "spread": (0, 1e9),
    "correlation_time": (1e-9, 1e12), "equilibrium": (-1, 1), "members": (1, 10_000), "points": (3, 1001),
}  # fmt: skip
_WHOLE = frozenset({"members", "points"})
_SEQUENCES = ("ramsey", "echo")


def read_parameters(given: dict[str, Any]) -> Parameters:
    """Check the caller's parameters; what is not given has its default. Raises `BadParameter`.

    `points` is made odd, so that one of them is half time.
    """
    names = (*_RANGES, "sequence")
    for name in given:
        if name not in names:
            raise BadParameter(f"there is no parameter {name!r}; known: {', '.join(names)}")
    if given.get("sequence", "ramsey") not in _SEQUENCES:
        raise BadParameter(f"sequence is {given['sequence']!r}; allowed: {' or '.join(_SEQUENCES)}")
    for name in given.keys() & _RANGES.keys():
        _check_number(name, given[name])
    parameters = Parameters(**{**given, "points": given.get("points", Parameters.points) | 1})
    if parameters.total_steps > MAX_STEPS:
        raise BadParameter(
            f"this takes {parameters.total_steps} steps, allowed: {MAX_STEPS}; "
            "lower members, duration, detuning or spread, or lengthen t1, t_phi or correlation_time"
        )
    return parameters


def _check_number(name: str, value: object) -> None:
    if name == "correlation_time" and value is None:
        return
    low, high = _RANGES[name]
    kinds = int if name in _WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise BadParameter(f"{name} is {value!r}; allowed: {kind} from {low:g} to {high:g}")


def simulate(parameters: Parameters, seed: str, *, extras: bool = True) -> dict[str, Any]:
    """Run the ensemble; the same parameters and seed give the same result.

    Without `extras` the inversion, the closed form and the spread of the ensemble are left out.
    """
    members = [_member(parameters, index, seed) for index in range(parameters.members)]
    columns = list(zip(*members, strict=True))
    mean = [sum(column) / len(members) for column in columns]
    coherence = [abs(s) for s in mean]
    times = [parameters.duration * k / (parameters.points - 1) for k in range(parameters.points)]
    result: dict[str, Any] = {
        "time": _figures(times),
        "coherence": _figures(coherence),
        "t2": _figure(1 / parameters.decay_rate),
        "t2_estimate": _figure_or_none(t2_estimate(parameters.sequence, times, coherence)),
        "t2_star": _figure_or_none(crossing(times, coherence)),
        "members": parameters.members,
        "steps": parameters.steps_per_point * (parameters.points - 1),
    }
    if extras:
        errors = [
            math.sqrt(sum(abs(s - m) ** 2 for s in column)) / len(members)
            for m, column in zip(mean, columns, strict=True)
        ]
        result |= {"standard_error": _figures(errors), "inversion": _figures(_inversion(parameters, len(times)))}
        if parameters.sequence == "ramsey":
            result["closed_form"] = _figures([closed_form(parameters, t) for t in times])
    return result


def _member(parameters: Parameters, index: int, seed: str) -> list[complex]:
    """The transverse Bloch vector of one qubit at every point.

    First detunings are one from each of `members` equally likely slices of the normal distribution, so that a small
    ensemble stands well for a large one (stratified sampling). Within a step the detuning is held.
    """
    noise = random.Random(f"{seed}/{index}")  # noqa: S311  reproducible on purpose
    slice_share = (index + noise.random()) / parameters.members
    offset = parameters.spread * NormalDist().inv_cdf(min(max(slice_share, EDGE), 1 - EDGE))
    step = parameters.duration / (parameters.points - 1) / parameters.steps_per_point
    keep, kick = _memory(parameters, step)
    factor = _rk4_factor(complex(-parameters.decay_rate, parameters.detuning + offset) * step)
    s, path = 1 + 0j, [1 + 0j]
    for point in range(1, parameters.points):
        for _ in range(parameters.steps_per_point):
            s *= factor
            if kick:
                offset = keep * offset + noise.gauss(0.0, kick)
                factor = _rk4_factor(complex(-parameters.decay_rate, parameters.detuning + offset) * step)
        if parameters.sequence == "echo" and 2 * point == parameters.points - 1:
            s = s.conjugate()
        path.append(s)
    return path


def _memory(parameters: Parameters, step: float) -> tuple[float, float]:
    """Of the exact update of an Ornstein-Uhlenbeck process: the share kept over a step, the deviation added."""
    if parameters.correlation_time is None:
        return 1.0, 0.0
    keep = math.exp(-step / parameters.correlation_time)
    return keep, parameters.spread * math.sqrt(1 - keep * keep)


def _rk4_factor(z: complex) -> complex:
    """What one classical fourth-order Runge-Kutta step of size h multiplies ds/dt = a s by, with z = h a."""
    return 1 + z * (1 + z / 2 * (1 + z / 3 * (1 + z / 4)))


def _inversion(parameters: Parameters, points: int) -> list[float]:
    """z at every point; it starts at 0, and an echo's turn about x reverses it."""
    step = parameters.duration / (points - 1) / parameters.steps_per_point
    factor = _rk4_factor(complex(-step / parameters.t1)).real ** parameters.steps_per_point
    z, path = 0.0, [0.0]
    for point in range(1, points):
        z = parameters.equilibrium + (z - parameters.equilibrium) * factor
        if parameters.sequence == "echo" and 2 * point == points - 1:
            z = -z
        path.append(z)
    return path


def closed_form(parameters: Parameters, t: float) -> float:
    """The coherence at time t of an endless ensemble without pulses."""
    tau = parameters.correlation_time
    chi = (parameters.spread * t) ** 2 / 2
    if tau is not None and t > tau * SLOW:
        chi = (parameters.spread * tau) ** 2 * (math.expm1(-t / tau) + t / tau)
    return math.exp(-t * parameters.decay_rate - chi)


def crossing(times: list[float], coherence: list[float]) -> float | None:
    """The first time at which the coherence falls to 1/e, between points on a straight line of its logarithm."""
    level = math.exp(-1)
    for k in range(1, len(times)):
        before, after = coherence[k - 1], coherence[k]
        if after <= level < before:
            share = math.log(before / level) / math.log(before / after) if after > 0 else 1.0
            return times[k - 1] + share * (times[k] - times[k - 1])
    return None


def t2_estimate(sequence: str, times: list[float], coherence: list[float]) -> float | None:
    """T2 as an experiment would read it from the curve; None where the curve does not tell.

    Echo: from the height of the revival, -T / ln C(T). Ramsey: -ln C = t/T2 + b t^2 by least squares over the points
    from the start down to a tenth, which parts the decay from the dephasing of a detuning that stays.
    """
    if sequence == "echo":
        return -times[-1] / math.log(coherence[-1]) if 0 < coherence[-1] < 1 else None
    lost = [k for k in range(1, len(times)) if coherence[k] <= 0.1]  # noqa: PLR2004
    points = [(times[k], -math.log(coherence[k])) for k in range(1, lost[0] if lost else len(times))]
    return _linear_rate(points)


def _linear_rate(points: list[tuple[float, float]]) -> float | None:
    """1/a of the least squares fit y = a t + b t^2; None with fewer than three points or a <= 0."""
    if len(points) < 3:  # noqa: PLR2004
        return None
    unit = points[-1][0]  # times as shares of the last one keep the sums near 1
    scaled = [(t / unit, y) for t, y in points]
    t2, t3, t4 = (sum(t**power for t, _ in scaled) for power in (2, 3, 4))
    ty, tty = sum(t * y for t, y in scaled), sum(t * t * y for t, y in scaled)
    rate = (ty * t4 - tty * t3) / (t2 * t4 - t3 * t3)
    return unit / rate if rate > 0 else None


def _figure(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")


def _figure_or_none(value: float | None) -> float | None:
    return None if value is None else _figure(value)


def _figures(values: list[float]) -> list[float]:
    return [_figure(value) for value in values]
