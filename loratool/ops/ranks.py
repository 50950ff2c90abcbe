"""Ranks: rules that turn singular values into ranks. Plain numbers, no tensors."""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loratool.core.errors import LoratoolError, UsageError

LOCAL = ("rank", "energy", "ratio", "cumulative", "knee", "keep")
"""Rules that look at one module at a time."""

GLOBAL = ("error", "size")
"""Rules that share one budget among all modules."""

CLOSE = 0.005
"""A size below its target by less than this share is near enough to begin filling up."""

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"\s*([0-9.]+)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """What decides the ranks: `kind` is one of LOCAL and GLOBAL, `text` its value as it was written.

    rank N; energy: share of the squared Frobenius norm to keep; ratio R: values from sigma_max / R up; cumulative:
    share of the sum of the values to keep; knee: up to the bend of the curve; keep: the rank as it is, whatever the
    limits say; error: relative error of the whole adapter; size: bytes of the file.
    """

    kind: str
    value: float
    text: str = ""

    @property
    def label(self) -> str:
        """For file names: `rank32`, `size50MiB`, `knee`."""
        return self.kind + re.sub(r"[^\w.]", "", self.text)

    @property
    def title(self) -> str:
        """For people: `rank 32`."""
        bare = self.kind in ("knee", "keep")
        return self.kind if bare else f"{self.kind} {self.text or repr(self.value)}"


@dataclass(frozen=True)
class Limits:
    """Bounds on every rule: `conv_rank` is the rank of all k x k convolutions, whatever the rule says."""

    min_rank: int = 1
    max_rank: int | None = None
    conv_rank: int | None = None

    def settings(self) -> dict[str, int | None]:
        """What a recipe says of them: what differs from the defaults."""
        least = self.min_rank if self.min_rank > 1 else None
        return {"min_rank": least, "max_rank": self.max_rank, "conv_rank": self.conv_rank}


@dataclass(frozen=True)
class Candidate:
    """What a rule sees of a module: singular values, descending, and the norm of its update.

    `full` is the rank as stored, `unit` the bytes of one rank, `kernel` whether it is a k x k convolution; `base_norm`
    and `base_peak` are the Frobenius and the spectral norm of the weight it updates (1 and None: not measured); `own`
    is a rule for this module alone.
    """

    values: Sequence[float]
    norm: float
    full: int
    unit: int
    kernel: bool = False
    base_norm: float = 1.0
    base_peak: float | None = None
    own: Rule | None = None


def parse_rule(kind: str, text: str) -> Rule:
    """The rule `--kind text`. Raises UsageError for a value out of range."""
    wrong = UsageError(f"--{kind} is {text!r}, expected {_EXPECTED[kind]}")
    if kind in ("knee", "keep"):
        return Rule(kind, 0.0)
    if kind == "size":
        match = _SIZE.fullmatch(text)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise wrong
        return Rule("size", _number(match[1], wrong) * unit, text.strip())
    value = _number(text, wrong)
    if not _RANGES[kind](value):
        raise wrong
    return Rule(kind, value, text.strip())


_EXPECTED = {
    "rank": "a whole number from 1",
    "energy": "a share, more than 0 and at most 1",
    "ratio": "a number from 1",
    "cumulative": "a share, more than 0 and at most 1",
    "knee": "no value",
    "keep": "no value",
    "error": "a relative error from 0 to less than 1",
    "size": "a size such as 50MiB",
}
_RANGES: Mapping[str, Callable[[float], bool]] = {
    "rank": lambda value: value >= 1 and value == int(value),
    "energy": lambda value: 0 < value <= 1,
    "ratio": lambda value: value >= 1,
    "cumulative": lambda value: 0 < value <= 1,
    "error": lambda value: 0 <= value < 1,
}


def _number(text: str, wrong: UsageError) -> float:
    try:
        value = float(text)
    except ValueError:
        raise wrong from None
    if not math.isfinite(value):
        raise wrong
    return value


def check_limits(limits: Limits) -> None:
    """Raises UsageError for bounds below 1, or that exclude each other."""
    for name, value in (("min", limits.min_rank), ("max", limits.max_rank), ("conv", limits.conv_rank)):
        if value is not None and value < 1:
            flag = f"--{name}-rank" if name != "conv" else "--conv-rank"
            raise UsageError(f"{flag} is {value}, expected 1 or more")
    if limits.max_rank is not None and limits.max_rank < limits.min_rank:
        raise UsageError(f"--min-rank is {limits.min_rank}, more than --max-rank {limits.max_rank}")


def choose(
    rule: Rule,
    candidates: Sequence[Candidate],
    limits: Limits | None = None,
    written: Callable[[Sequence[int]], int] | None = None,
) -> list[int]:
    """The rank of every candidate. `written(ranks)` is the size in bytes of the file with these ranks.

    Raises LoratoolError for a size below the smallest possible.
    """
    limits = limits or Limits()
    fixed = [_fixed(rule, one, limits) for one in candidates]
    if rule.kind in LOCAL:
        return [rank if rank is not None else 0 for rank in fixed]
    if rule.kind == "error":
        return _by_error(rule, candidates, fixed, limits)
    assert written is not None
    return _by_size(rule, candidates, fixed, limits, written)


def _fixed(rule: Rule, one: Candidate, limits: Limits) -> int | None:
    """The rank of a module on which no global rule has a say; None where it has."""
    if (one.own or rule).kind == "keep":
        return one.full
    if one.own is not None:
        return _clamped(_local(one.own, one), one, limits)
    if one.kernel and limits.conv_rank is not None:
        return min(limits.conv_rank, one.full)
    if rule.kind in GLOBAL:
        return None
    return _clamped(_local(rule, one), one, limits)


def _clamped(rank: int, one: Candidate, limits: Limits) -> int:
    if limits.max_rank is not None:
        rank = min(rank, limits.max_rank)
    return min(max(rank, limits.min_rank), one.full)


def _local(rule: Rule, one: Candidate) -> int:
    values, live = one.values, sum(value > 0 for value in one.values)
    if rule.kind == "rank":
        return int(rule.value)
    if not live:
        return 1
    if rule.kind == "ratio":
        floor = (one.values[0] if one.base_peak is None else one.base_peak) / rule.value
        return sum(value >= floor for value in values)
    if rule.kind == "knee":
        return _knee(values[:live])
    if rule.kind == "cumulative":
        sums = list(accumulate(values[:live]))
        return bisect_left(sums, rule.value * sums[-1] * (1 - 1e-12)) + 1
    if rule.kind == "energy":
        return _enough(one, live, (1 - rule.value) * one.norm**2)
    raise UsageError(f"the rule {rule.kind} is for all modules together", hint=f"use one of: {', '.join(LOCAL)}")


def _enough(one: Candidate, live: int, budget: float) -> int:
    """The smallest rank that loses at most `budget` of the squared norm."""
    lost = 0.0
    for rank in range(live, 0, -1):
        lost += one.values[rank - 1] ** 2
        if lost > budget:
            return rank
    return 1


def _knee(values: Sequence[float]) -> int:
    """Up to the point farthest below the line from the first value to the last (Satopaa et al. 2011, "Kneedle")."""
    last, drop = len(values) - 1, values[0] - values[-1]
    if last < 2 or drop <= 0:
        return len(values)
    return 1 + max(range(last + 1), key=lambda i: 1 - i / last - (values[i] - values[-1]) / drop)


# -- one budget for all ----------------------------------------------------------------------------------------------


def _start(candidates: Sequence[Candidate], fixed: Sequence[int | None], limits: Limits) -> list[int]:
    """Everything that carries something, within the bounds: from here ranks are taken away."""
    return [
        rank if rank is not None else _clamped(sum(value > 0 for value in one.values), one, limits)
        for one, rank in zip(candidates, fixed, strict=True)
    ]


def _cost(one: Candidate, rank: int) -> float:
    """Squared error that taking the last of `rank` away adds, relative to the base weight where that was measured."""
    return (one.values[rank - 1] / one.base_norm) ** 2 if rank <= len(one.values) else 0.0


def _removals(
    candidates: Sequence[Candidate], ranks: Sequence[int], fixed: Sequence[int | None], limits: Limits
) -> list[tuple[float, int, int]]:
    """Every (error removed per byte, module, rank before), the cheapest first: the optimal order to cut in.

    Within a module the values descend, so that the last component always comes first.
    """
    cuts = [
        (_cost(one, rank) / one.unit, index, -rank)
        for index, one in enumerate(candidates)
        if fixed[index] is None
        for rank in range(ranks[index], min(limits.min_rank, one.full), -1)
    ]
    cuts.sort(key=lambda cut: (cut[0], cut[2], cut[1]))
    return [(cost, index, -negative) for cost, index, negative in cuts]


def _by_error(rule: Rule, candidates: Sequence[Candidate], fixed: Sequence[int | None], limits: Limits) -> list[int]:
    ranks = _start(candidates, fixed, limits)
    total = math.fsum((one.norm / one.base_norm) ** 2 for one in candidates)
    lost = math.fsum(
        _cost(one, at)
        for one, rank in zip(candidates, ranks, strict=True)
        for at in range(rank + 1, len(one.values) + 1)
    )
    budget = rule.value**2 * total - lost
    for _, index, rank in _removals(candidates, ranks, fixed, limits):
        cost = _cost(candidates[index], rank)
        if cost <= budget and ranks[index] == rank:
            budget -= cost
            ranks[index] = rank - 1
    return ranks


def _by_size(
    rule: Rule,
    candidates: Sequence[Candidate],
    fixed: Sequence[int | None],
    limits: Limits,
    written: Callable[[Sequence[int]], int],
) -> list[int]:
    whole = [_clamped(one.full, one, limits) if fixed[i] is None else fixed[i] or 0 for i, one in enumerate(candidates)]
    if written(whole) <= rule.value:
        return whole
    start = _start(candidates, fixed, limits)
    size = written(start)
    if size <= rule.value:
        return start
    least = [min(limits.min_rank, one.full) if fixed[i] is None else start[i] for i, one in enumerate(candidates)]
    smallest = written(least)
    if smallest > rule.value:
        unit, size = ("MiB", 1 << 20) if smallest >= 1 << 20 else ("KiB", 1 << 10)
        # Rounded up, and with room for its longer text in the recipe, so that asking for it works.
        possible = math.ceil((smallest + 64) / size * 100) / 100
        raise LoratoolError(
            f"cannot be brought to {rule.text}: the smallest possible is {possible:.2f}{unit}",
            hint="another --dtype or fewer modules make it smaller",
        )
    cuts = _removals(candidates, start, fixed, limits)
    saved = [0, *accumulate(candidates[index].unit for _, index, _ in cuts)]
    # The header shrinks a little, too, and a Tucker core is not linear in its rank: guess, measure, guess again.
    low, count, ranks = 0, len(cuts), least
    guess, size = bisect_left(saved, size - rule.value), smallest
    halve = False
    while count - low > 1 and rule.value - size > CLOSE * rule.value:
        guess = (low + count) // 2 if halve else min(max(guess, low + 1), count - 1)
        tried = _after(start, cuts[:guess])
        now = written(tried)
        if now <= rule.value:
            count, ranks, size = guess, tried, now
        else:
            low = guess
        guess, halve = bisect_left(saved, saved[guess] + now - rule.value), not halve
    room = rule.value - size
    for share in (1.0, 0.75, 0.5, 0.25, 0.125):
        filled = _filled(list(ranks), candidates, cuts[:count], room * share)
        if written(filled) <= rule.value:
            return filled
    return ranks


def _after(start: Sequence[int], cuts: Sequence[tuple[float, int, int]]) -> list[int]:
    ranks = list(start)
    for _, index, rank in cuts:
        ranks[index] = min(ranks[index], rank - 1)
    return ranks


def _filled(
    ranks: list[int], candidates: Sequence[Candidate], cuts: Sequence[tuple[float, int, int]], room: float
) -> list[int]:
    """What still fits of what was cut, the dearest first."""
    back = [(-cost, rank, index) for cost, index, rank in cuts]
    heapq.heapify(back)
    while back and room > 0:
        _, rank, index = heapq.heappop(back)
        # Ten bytes for longer numbers in the header.
        if ranks[index] == rank - 1 and candidates[index].unit + 10 <= room:
            ranks[index] = rank
            room -= candidates[index].unit + 10
    return ranks
