"""probe: what it measures, and that it sees what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loratool.core.module import Module
from loratool.core.registry import layouts
from loratool.core.tensor import LazyTensor
from loratool.ops.probe import applied, measure
from loratool.ops.regroup import regroup
from tests.builders import architecture_of, build, typical_parts
from tests.ops.test_decompose import FAMILIES

ARCHITECTURE = architecture_of("flux")


def modules() -> tuple[Module, ...]:
    parts = [part for part in typical_parts("flux", "kohya", alpha=2.0) if part.weight.component == "transformer"][:6]
    return layouts()["kohya"].read(build(parts, "kohya"), ARCHITECTURE).modules


def off(expected: tuple[Module, ...], written: list[Module] | tuple[Module, ...]) -> list[float]:
    return [one.error for one in measure([[(module, 1.0)] for module in expected], written)]


def test_the_same_is_the_same_however_it_is_grouped() -> None:
    ours = modules()
    split = regroup(ours, {"transformer": ARCHITECTURE.naming("transformer", "diffusers")}).modules
    assert len(split) > len(ours)
    assert max(off(ours, ours)) == 0.0
    assert max(off(ours, split)) <= 1e-6
    assert max(off(split, ours)) <= 1e-6


def test_a_wrong_alpha_is_seen_at_its_size() -> None:
    ours = modules()
    wrong = [replace(ours[0], alpha=2.2), *ours[1:]]
    errors = off(ours, wrong)
    assert errors[0] == pytest.approx(0.1, rel=1e-3) and max(errors[1:]) == 0.0
    assert off(ours, [replace(ours[0], alpha=-2.0), *ours[1:]])[0] == pytest.approx(2.0, rel=1e-3)


def test_swapped_rows_are_seen() -> None:
    ours = modules()
    up = ours[0].factors["up"].load()
    swapped = LazyTensor.from_torch(torch.cat([up[1:2], up[:1], up[2:]]))
    errors = off(ours, [replace(ours[0], factors={**ours[0].factors, "up": swapped}), *ours[1:]])
    assert errors[0] > 1e-3 and max(errors[1:]) == 0.0


def test_something_where_nothing_should_be_is_infinite() -> None:
    ours = modules()
    assert off(ours[1:], ours)[0] == math.inf
    zero = LazyTensor.from_torch(torch.zeros_like(ours[0].factors["up"].load()))
    nothing = replace(ours[0], factors={**ours[0].factors, "up": zero})
    assert off(ours, [nothing, *ours[1:]])[0] == 1.0
    assert off(ours[1:], [nothing, *ours[1:]])[0] == 0.0


def test_a_dropped_module_is_seen() -> None:
    """What is expected and is not there is measured as an entry of its own."""
    ours = modules()
    measured = measure([[(module, 1.0)] for module in ours], ours[1:])
    assert [one.error for one in measured[: len(ours) - 1]] == [0.0] * (len(ours) - 1)
    gone = measured[len(ours) - 1 :]
    assert [one.title for one in gone] == [f"{t.component}.{t.path}" for t in ours[0].targets]
    assert all(one.error == 1.0 for one in gone)
    silent = measure([[(ours[0], 0.0)], *([(module, 1.0)] for module in ours[1:])], ours[1:])
    assert len(silent) == len(ours) - 1


def test_sums_of_terms() -> None:
    one, other = modules()[0], modules()[0]
    made = replace(one, alpha=2.0 * (0.5 - 2.0))
    (found,) = measure([[(one, 0.5), (other, -2.0)]], [made])
    assert found.error <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_applied_is_the_update_times_the_vectors(name: str) -> None:
    one = FAMILIES[name]
    x = torch.randn(one.delta_width, 3, generator=torch.Generator().manual_seed(0))
    expected = one.delta().flatten(1) @ x
    assert float((torch.from_numpy(applied(one, x.numpy())) - expected).norm()) <= 1e-5 * float(expected.norm())


def test_the_estimate_is_near_the_norm() -> None:
    for one in modules():
        (found,) = measure([[(one, 1.0)]], [one])
        assert found.norm == pytest.approx(float(one.delta().double().norm()), rel=0.35)
