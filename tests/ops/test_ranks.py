"""ranks: every rule against its definition, worked out here by trying all ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loratool.core.errors import LoratoolError, UsageError
from loratool.ops.ranks import GLOBAL, LOCAL, Candidate, Limits, Rule, check_limits, choose, parse_rule

ROOM = 1e-9
"""Rules compare sums of floats with a bound: a rank whose sum is this near to it (relative) may go either way."""


def candidate(
    values: Sequence[float], *, full: int | None = None, unit: int = 100, kernel: bool = False, own: Rule | None = None
) -> Candidate:
    norm = math.sqrt(math.fsum(value * value for value in values))
    return Candidate(tuple(values), norm, full or len(values), unit, kernel, own=own)


@st.composite
def spectra(draw: st.DrawFn, smallest: int = 1, largest: int = 12) -> list[float]:
    """Descending values: smooth, in steps, or falling by orders of magnitude; some zeros at the end."""
    count = draw(st.integers(smallest, largest))
    kind = draw(st.sampled_from(["any", "steps", "decades"]))
    number = {
        "any": st.floats(1e-3, 10),
        "steps": st.sampled_from([1.0, 2.0, 4.0]),
        "decades": st.integers(-6, 3).map(lambda n: 10.0**n),
    }[kind]
    values = sorted(draw(st.lists(number, min_size=count, max_size=count)), reverse=True)
    zeros = draw(st.integers(0, 3))
    return values + [0.0] * zeros


def local(kind: str, value: float, one: Candidate, limits: Limits | None = None) -> int:
    (rank,) = choose(Rule(kind, value), [one], limits)
    return rank


# -- one module at a time -------------------------------------------------------------------------------------------


@given(spectra(), st.integers(1, 20))
def test_rank(values: list[float], rank: int) -> None:
    assert local("rank", rank, candidate(values)) == min(rank, len(values))


@given(spectra(), st.floats(1e-6, 1.0))
def test_energy_is_the_smallest_rank_that_keeps_the_share(values: list[float], share: float) -> None:
    total = math.fsum(value**2 for value in values)
    kept = [math.fsum(value**2 for value in values[:rank]) / total for rank in range(len(values) + 1)]
    assume(all(abs(one - share) > ROOM for one in kept))
    assert local("energy", share, candidate(values)) == next(k for k in range(1, len(kept)) if kept[k] >= share)


@given(spectra())
def test_all_the_energy_is_everything_that_is_not_zero(values: list[float]) -> None:
    assert local("energy", 1.0, candidate(values)) == sum(value > 0 for value in values)
    assert local("cumulative", 1.0, candidate(values)) <= sum(value > 0 for value in values)


@given(spectra(), st.floats(1e-6, 1.0))
def test_cumulative_is_the_smallest_rank_that_keeps_the_share_of_the_sum(values: list[float], share: float) -> None:
    kept = [math.fsum(values[:rank]) / math.fsum(values) for rank in range(len(values) + 1)]
    assume(all(abs(one - share) > ROOM for one in kept))
    assert local("cumulative", share, candidate(values)) == next(k for k in range(1, len(kept)) if kept[k] >= share)


@given(spectra(), st.floats(1.0, 1e4))
def test_ratio_keeps_what_is_not_below_the_largest_over_the_ratio(values: list[float], ratio: float) -> None:
    assume(all(abs(value * ratio / values[0] - 1) > ROOM for value in values[1:]))
    expected = sum(value >= values[0] / ratio for value in values)
    assert local("ratio", ratio, candidate(values)) == expected


def test_ratio_with_a_base_measures_against_its_spectral_norm() -> None:
    one = replace(candidate([4.0, 2.0, 1.0, 0.5]), base_peak=100.0)
    assert local("ratio", 100.0, one) == 3
    assert local("ratio", 10.0, one) == 1  # nothing reaches 10: the smallest rank remains
    assert local("ratio", 10.0, one, Limits(min_rank=2)) == 2


def farthest(values: Sequence[float]) -> list[int]:
    """The ranks whose point (i, value) lies farthest below the chord, by its distance from the line."""
    last = len(values) - 1
    dx, dy = last, values[-1] - values[0]
    distance = [(dx * (values[0] - value) + dy * i) / math.hypot(dx, dy) for i, value in enumerate(values)]
    return [i + 1 for i, one in enumerate(distance) if one >= max(distance) - ROOM * abs(dy)]


@given(spectra(3))
def test_knee_is_the_point_farthest_below_the_chord(values: list[float]) -> None:
    live = [value for value in values if value > 0]
    assume(live[0] - live[-1] > ROOM)
    assert local("knee", 0, candidate(values)) in farthest(live)


@pytest.mark.parametrize("values", [[1.0], [2.0, 1.0], [3.0, 3.0, 3.0], [3.0, 3.0, 0.0]])
def test_no_knee_keeps_everything_that_is_not_zero(values: list[float]) -> None:
    assert local("knee", 0, candidate(values)) == sum(value > 0 for value in values)


def test_knee_of_an_obvious_bend() -> None:
    assert local("knee", 0, candidate([10.0, 9.0, 8.0, 0.3, 0.2, 0.1])) == 4


@pytest.mark.parametrize("kind", [kind for kind in LOCAL if kind not in ("rank", "keep")])
def test_a_zero_module_gets_the_smallest_rank(kind: str) -> None:
    zero = candidate([0.0] * 8)
    assert local(kind, 0.5 if kind != "ratio" else 2.0, zero) == 1
    assert local(kind, 0.5 if kind != "ratio" else 2.0, zero, Limits(min_rank=3)) == 3


@given(spectra(), st.sampled_from([kind for kind in LOCAL if kind != "keep"]), st.integers(1, 6), st.integers(0, 6))
def test_bounds(values: list[float], kind: str, low: int, more: int) -> None:
    one = candidate(values)
    free = local(kind, {"rank": 4, "ratio": 3.0}.get(kind, 0.9), one)
    limits = Limits(min_rank=low, max_rank=low + more)
    bound = local(kind, {"rank": 4, "ratio": 3.0}.get(kind, 0.9), one, limits)
    assert bound == min(max(min(free, low + more), low), len(values))


def test_conv_rank_is_for_kernels_only_and_whatever_the_rule_says() -> None:
    values = [5.0, 4.0, 3.0, 2.0, 1.0]
    modules = [candidate(values), candidate(values, kernel=True), candidate(values[:2], kernel=True)]
    limits = Limits(conv_rank=3, max_rank=2)
    assert choose(Rule("rank", 4), modules, limits) == [2, 3, 2]
    for rule in (Rule("error", 0.9), Rule("size", 1e9)):
        assert choose(rule, modules, limits, lambda ranks: 0)[1:] == [3, 2]


def test_a_modules_own_rule_wins() -> None:
    values = [5.0, 4.0, 3.0, 2.0, 1.0]
    own = candidate(values, kernel=True, own=Rule("rank", 4))
    for rule in (Rule("rank", 1), Rule("energy", 0.1), Rule("error", 0.99), Rule("size", 600)):
        ranks = choose(rule, [own, candidate(values)], Limits(conv_rank=2), lambda ranks: 100 * sum(ranks))
        assert ranks[0] == 4, rule
    assert choose(Rule("rank", 1), [own], Limits(max_rank=3)) == [3]


def test_keep_is_the_rank_as_it_is_whatever_else_is_said() -> None:
    values = [5.0, 4.0, 0.0]
    modules = [candidate(values, own=Rule("keep", 0.0)), candidate(values, kernel=True, own=Rule("keep", 0.0))]
    for rule in (Rule("rank", 1), Rule("error", 0.9), Rule("size", 1e9), Rule("keep", 0.0)):
        assert choose(rule, modules, Limits(max_rank=2, conv_rank=1), lambda ranks: 0) == [3, 3]


@pytest.mark.parametrize("kind", GLOBAL)
def test_a_global_rule_for_one_module_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="all modules together"):
        choose(Rule("rank", 1), [candidate([1.0], own=Rule(kind, 0.5))])


# -- one budget for all ---------------------------------------------------------------------------------------------


@st.composite
def adapters(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(1, 3))
    found = []
    for _ in range(count):
        values = draw(spectra(1, 4))
        one = candidate(values, unit=draw(st.sampled_from([50, 100, 100, 300])))
        found.append(replace(one, base_norm=draw(st.sampled_from([1.0, 1.0, 0.1, 40.0]))))
    return found


def lost(modules: Sequence[Candidate], ranks: Sequence[int]) -> float:
    """Squared error, relative to the base weights where these were measured."""
    return math.fsum(
        (value / one.base_norm) ** 2 for one, rank in zip(modules, ranks, strict=True) for value in one.values[rank:]
    )


def every(modules: Sequence[Candidate], low: int = 1) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(min(low, one.full), one.full + 1) for one in modules)))


@given(adapters(), st.floats(0.0, 0.99))
@settings(max_examples=150, deadline=None)
def test_error_keeps_the_bound_and_no_single_cut_more_would(modules: list[Candidate], error: float) -> None:
    ranks = choose(Rule("error", error), modules)
    total = lost(modules, [0] * len(modules))
    budget = error**2 * total
    assert lost(modules, ranks) <= budget + ROOM * total
    for index, rank in enumerate(ranks):
        if rank > 1:
            less = [*ranks[:index], rank - 1, *ranks[index + 1 :]]
            assert lost(modules, less) > budget - ROOM * total


@given(adapters(), st.floats(0.0, 0.99))
@settings(max_examples=150, deadline=None)
def test_error_with_equal_units_is_as_small_as_any_choice_can_be(modules: list[Candidate], error: float) -> None:
    """Where every rank costs the same bytes, cheapest first takes away as many ranks as any choice would."""
    modules = [replace(one, unit=100) for one in modules]
    budget = error**2 * lost(modules, [0] * len(modules))
    assume(all(abs(lost(modules, ranks) - budget) > ROOM * max(budget, 1e-12) for ranks in every(modules)))
    ranks = choose(Rule("error", error), modules)
    assert sum(ranks) == min(sum(choice) for choice in every(modules) if lost(modules, choice) <= budget)


@given(adapters(), st.floats(0.0, 0.99))
@settings(max_examples=100, deadline=None)
def test_error_with_other_units_is_near_the_smallest(modules: list[Candidate], error: float) -> None:
    """A knapsack: cheapest first is off by less than what one rank of the largest module takes."""
    budget = error**2 * lost(modules, [0] * len(modules))
    assume(all(abs(lost(modules, ranks) - budget) > ROOM * max(budget, 1e-12) for ranks in every(modules)))

    def size(ranks: Sequence[int]) -> int:
        return sum(one.unit * rank for one, rank in zip(modules, ranks, strict=True))

    best = min(size(choice) for choice in every(modules) if lost(modules, choice) <= budget)
    assert size(choose(Rule("error", error), modules)) <= best + max(one.unit for one in modules)


@given(adapters(), st.integers(0, 2000), st.integers(0, 4000))
@settings(max_examples=200, deadline=None)
def test_size_fits_and_is_greedy_by_error_per_byte(modules: list[Candidate], fixed: int, target: int) -> None:
    def written(ranks: Sequence[int]) -> int:
        return fixed + sum(one.unit * rank for one, rank in zip(modules, ranks, strict=True))

    smallest = written([1] * len(modules))
    rule = Rule("size", float(target), f"{target}B")
    if smallest > target:
        with pytest.raises(LoratoolError, match="the smallest possible is"):
            choose(rule, modules, written=written)
        return
    ranks = choose(rule, modules, written=written)
    assert written(ranks) <= target
    # The cheapest removals (error per byte), one after the other, until it fits: never worse than that.
    plain = [one.full for one in modules]
    while written(plain) > target:
        open_ = [i for i, rank in enumerate(plain) if rank > 1]
        worst = min(
            open_, key=lambda i: (modules[i].values[plain[i] - 1] / modules[i].base_norm) ** 2 / modules[i].unit
        )
        plain[worst] -= 1
    total = lost(modules, [0] * len(modules))
    assert lost(modules, ranks) <= lost(modules, plain) + ROOM * total
    # And nothing that was cut and carries something would still fit, but for what the header may need.
    for index, rank in enumerate(ranks):
        one = modules[index]
        if rank < one.full and one.values[rank] > 0:
            assert written([*ranks[:index], rank + 1, *ranks[index + 1 :]]) + 10 > target


def test_a_size_that_is_not_exceeded_leaves_everything() -> None:
    modules = [candidate([3.0, 1.0, 0.0, 0.0]), candidate([0.0, 0.0])]
    assert choose(Rule("size", 600.0), modules, written=lambda ranks: 100 * sum(ranks)) == [4, 2]
    assert choose(Rule("size", 599.0), modules, written=lambda ranks: 100 * sum(ranks))[0] >= 2


def test_size_obeys_the_bounds() -> None:
    modules = [candidate([3.0, 2.0, 1.0, 0.5]), candidate([0.3, 0.2, 0.1])]

    def written(ranks: Sequence[int]) -> int:
        return 100 * sum(ranks)

    assert choose(Rule("size", 400.0), modules, Limits(min_rank=2), written) == [2, 2]
    assert choose(Rule("size", 10_000.0), modules, Limits(max_rank=2), written) == [2, 2]
    with pytest.raises(LoratoolError, match="smallest possible"):
        choose(Rule("size", 399.0, "399B"), modules, Limits(min_rank=2), written)


def test_a_size_that_does_not_fall_evenly_still_fits() -> None:
    """As a Tucker core, whose bytes go with the square of its rank, and a header that shrinks."""
    modules = [candidate([1.0 / (n + 1) for n in range(16)], unit=40) for _ in range(6)]

    def written(ranks: Sequence[int]) -> int:
        return 500 + sum(40 * rank + 9 * rank * rank + 7 * len(str(rank)) for rank in ranks)

    for target in range(written([1] * 6), written([16] * 6) + 100, 97):
        ranks = choose(Rule("size", float(target)), modules, written=written)
        assert written(ranks) <= target
        assert written(ranks) >= min(0.98 * target - 400, written([16] * 6))


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("rank", "32", 32.0),
        ("energy", "0.99", 0.99),
        ("energy", "1", 1.0),
        ("ratio", "50", 50.0),
        ("cumulative", "0.9", 0.9),
        ("error", "0", 0.0),
        ("error", "0.1", 0.1),
        ("size", "50MiB", 50 * 2**20),
        ("size", "50 mib", 50 * 2**20),
        ("size", "1.5GB", 1.5e9),
        ("size", "100kB", 1e5),
        ("size", "123", 123.0),
        ("size", "7B", 7.0),
        ("knee", "", 0.0),
    ],
)
def test_rules_are_read(kind: str, text: str, value: float) -> None:
    rule = parse_rule(kind, text)
    assert (rule.kind, rule.value) == (kind, value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("rank", text) for text in ("0", "-1", "1.5", "x", "", "inf", "nan")),
        *(("energy", text) for text in ("0", "1.01", "-0.1", "nan", "99%")),
        *(("ratio", text) for text in ("0.9", "0", "inf", "nan")),
        *(("cumulative", text) for text in ("0", "2")),
        *(("error", text) for text in ("1", "-0.1", "nan")),
        *(("size", text) for text in ("", "MiB", "5 TB", "1.2.3MB", "-5MB", "inf")),
    ],
)
def test_a_value_out_of_range_is_told_with_what_was_expected(kind: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--{kind} is .*, expected"):
        parse_rule(kind, text)


def test_labels_are_parts_of_file_names() -> None:
    rules = [parse_rule(k, t) for k, t in (("rank", "32"), ("size", "50 MiB"), ("knee", ""), ("energy", "0.99"))]
    assert [rule.label for rule in rules] == ["rank32", "size50MiB", "knee", "energy0.99"]
    assert [rule.title for rule in rules] == ["rank 32", "size 50 MiB", "knee", "energy 0.99"]


@pytest.mark.parametrize("limits", [Limits(0), Limits(1, 0), Limits(1, None, 0), Limits(5, 4)])
def test_bounds_that_make_no_sense(limits: Limits) -> None:
    with pytest.raises(UsageError, match="rank is"):
        check_limits(limits)
