"""Every merge method keeps the contract, refuses what makes no sense, and random ones are reproducible."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.core.errors import UsageError
from loratool.core.registry import methods
from loratool.merging import _noise
from tests.contracts import PairUpdate, check_merge_method, merged, random_updates

METHODS = methods()
RANDOM = [method for method in METHODS.values() if "seed" in method.options]
LINEAR_IN_STRENGTH = sorted(METHODS.keys() - {"nuslerp", "karcher"})
"""Methods for which one input of weight w is w times its update."""

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_random = pytest.mark.parametrize("method", RANDOM, ids=[method.id for method in RANDOM])


def test_all_are_there() -> None:
    assert sorted(METHODS) == [
        "breadcrumbs",
        "breadcrumbs_ties",
        "concat",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "karcher",
        "knots",
        "linear",
        "magnitude_prune",
        "nearswap",
        "nuslerp",
        "sce",
        "slerp",
        "ties",
    ]


@each_method
def test_contract(method: Any) -> None:
    check_merge_method(method)


@pytest.mark.parametrize("weight", [0.7, -1.3, 2.0])
@pytest.mark.parametrize("name", LINEAR_IN_STRENGTH)
def test_strengths_are_linear(name: str, weight: float) -> None:
    one = random_updates((3,))
    torch.testing.assert_close(merged(METHODS[name], one, [weight]), weight * one[0].dense())


@pytest.mark.parametrize("name", ["nuslerp", "karcher"])
def test_strengths_are_shares_unless_told_otherwise(name: str) -> None:
    one, both = random_updates((3,)), random_updates((3, 2))
    torch.testing.assert_close(merged(METHODS[name], one, [0.7]), one[0].dense())
    torch.testing.assert_close(merged(METHODS[name], one, [0.7], normalize=False), 0.7 * one[0].dense())
    whole = merged(METHODS[name], both, [0.25, 0.75])
    torch.testing.assert_close(merged(METHODS[name], both, [1.0, 3.0]), whole)
    torch.testing.assert_close(merged(METHODS[name], both, [1.0, 3.0], normalize=False), 4 * whole)


@pytest.mark.parametrize("name", ["della", "breadcrumbs_ties", "ties", "dare_ties", "knots"])
def test_normalize_takes_the_strength_of_one_input_away(name: str) -> None:
    one = random_updates((3,))
    torch.testing.assert_close(merged(METHODS[name], one, [0.7], normalize=True), one[0].dense())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "density" in method.options])
def test_density_0_leaves_nothing(name: str) -> None:
    assert not merged(METHODS[name], random_updates((2, 2)), [1.0, 1.0], density=0.0).any()


BAD = {
    "density": (-0.1, 1.1, float("nan")),
    "select_topk": (-0.1, 1.1),
    "gamma": (-0.1, 1.1),
    "epsilon": (-0.1, 0.5, float("nan")),
    "lambda": (float("inf"), float("nan")),
    "sign": ("sum", ""),
    "t": (float("nan"),),
    "max_iter": (-1, 10**9, 10**400),
    "tol": (-1.0, 2.0, float("nan")),
}


@each_method
def test_bad_options_are_refused(method: Any) -> None:
    assert set(method.options) <= {*BAD, "seed", "normalize", "flatten", "row_wise"}
    updates = random_updates((2, 2))
    for name, values in BAD.items():
        for value in values if name in method.options else ():
            # a neutral density needs neither epsilon nor gamma, but a wrong one is told all the same
            options = {"density": 0.5} if "density" in method.options else {}
            with pytest.raises(UsageError, match=name):
                method.apply(updates, [1.0, 1.0], {**options, name: value})


def test_nearswap_refuses_a_negative_threshold() -> None:
    with pytest.raises(UsageError, match="t is -1"):
        METHODS["nearswap"].apply(random_updates((2, 2)), [1.0, 1.0], {"t": -1.0})


def test_linear_refuses_different_ranks() -> None:
    with pytest.raises(UsageError, match="2, 3"):
        METHODS["linear"].apply(random_updates((2, 3)), [1.0, 1.0], {})
    assert merged(METHODS["linear"], random_updates((0, 3, 3)), [1.0, 1.0, 1.0]).any()


@each_random
def test_seeds(method: Any) -> None:
    updates = random_updates((2, 2, 2))
    options = {"density": 0.5}
    first = merged(method, updates, [1.0, 1.0, 1.0], seed=1, **options)
    assert torch.equal(first, merged(method, updates, [1.0, 1.0, 1.0], seed=1, **options))
    assert not torch.equal(first, merged(method, updates, [1.0, 1.0, 1.0], seed=2, **options))


@each_random
def test_threads_do_not_matter(method: Any) -> None:
    updates = random_updates((2, 2), shape=(300, 400))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(method.apply(updates, [1.0, 0.5], {"density": 0.5, "seed": 7}))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_noise_depends_on_seed_index_and_name_alone() -> None:
    one, two = random_updates((1, 1), shape=(2, 2))
    cpu = torch.device("cpu")
    first = _noise.uniform(one, 0, cpu)
    # The numbers themselves: a change would change what a recipe with a seed means.
    torch.testing.assert_close(first, torch.tensor(FIRST_NUMBERS), rtol=0, atol=1e-7)
    renamed = PairUpdate(0, "other", one.left, one.right)
    for other in (_noise.uniform(two, 0, cpu), _noise.uniform(one, 1, cpu), _noise.uniform(renamed, 0, cpu)):
        assert not torch.equal(first, other)


FIRST_NUMBERS = [[0.10917747, 0.46607947], [0.18990654, 0.88867486]]


def test_density_is_kept_on_average() -> None:
    updates = random_updates((4,), shape=(200, 300))
    for name in ("dare_linear", "della_linear"):
        found = merged(METHODS[name], updates, [1.0], density=0.3, seed=5)
        assert float((found != 0).double().mean()) == pytest.approx(0.3, abs=0.01)
        dense = updates[0].dense()
        assert float((found * dense).sum() / (dense * dense).sum()) == pytest.approx(1.0, abs=0.05)


@each_method
def test_documented(method: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "merging.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## `{method.id}`\n")[2].partition("\n## ")[0]
    listed = re.search(r"- Options: (.*?)\.\s", section, re.DOTALL)
    assert listed, f"{method.id} has no section with options"
    options = ", ".join(f"`{o.name}` {o.default}" for o in method.options.values()) or "none"
    assert " ".join(listed[1].split()).removesuffix(", all as for `ties`") == options
