"""LoHa: the family's contract, and its update against LyCORIS' and PEFT's own."""

from __future__ import annotations

from math import prod

import pytest
import torch
from lycoris.functional.loha import diff_weight
from lycoris.modules.loha import LohaModule
from peft.tuners.loha import layer as peft
from peft.tuners.loha.config import LoHaConfig

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Part
from loratool.families.loha import FAMILY
from tests.contracts import assert_same, check_family, dense
from tests.families.common import LAYERS, factors, module_of, shuffle, stored

NAMES = {role: f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "linear": (factors(w1_a=(12, 4), w1_b=(4, 10), w2_a=(12, 4), w2_b=(4, 10)), 2.0),
    "rank 1, odd sizes": (factors(w1_a=(7, 1), w1_b=(1, 5), w2_a=(7, 1), w2_b=(1, 5)), None),
    "two ranks": (factors(w1_a=(6, 2), w1_b=(2, 5), w2_a=(6, 3), w2_b=(3, 5)), 1.0),
    "Tucker 3x3": (factors(w1_a=(2, 6), w1_b=(2, 5), w2_a=(2, 6), w2_b=(2, 5), t1=(2, 2, 3, 3), t2=(2, 2, 3, 3)), 4.0),
    "Tucker 1x3": (factors(w1_a=(1, 6), w1_b=(1, 4), w2_a=(1, 6), w2_b=(1, 4), t1=(1, 1, 1, 3), t2=(1, 1, 1, 3)), 1.0),
}


def test_contract() -> None:
    check_family(FAMILY, SAMPLES)


def test_parts_share_their_right_sides_or_add_their_ranks() -> None:
    first, second = SAMPLES["linear"][0], factors(5, w1_a=(4, 3), w1_b=(3, 10), w2_a=(4, 3), w2_b=(3, 10))
    stacked = FAMILY.stacked([Part(12, first), Part(2, None), Part(4, second, 0.5)])
    assert FAMILY.rank({role: one.shape for role, one in stacked.items()}) == 7
    expected = torch.cat([dense(FAMILY, first), torch.zeros(2, 10).double(), dense(FAMILY, second) * 0.5])
    assert_same(dense(FAMILY, stacked), expected, "stack")
    assert FAMILY.live(FAMILY.rows(stacked, 14, 18)) == (4, 5, 6)
    assert FAMILY.live(FAMILY.rows(stacked, 12, 14)) == ()
    upper, lower = FAMILY.rows(first, 0, 5), FAMILY.rows(first, 5, 12)
    assert FAMILY.stacked([Part(5, upper), Part(7, lower)])["w1_b"].shape == (4, 10)
    with pytest.raises(NotExact, match="Tucker"):
        FAMILY.stacked([Part(6, SAMPLES["Tucker 3x3"][0])] * 2)


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (4, 2)}, "no w2_b"),
        ({"w1_a": (4, 2), "w1_b": (3, 4), "w2_a": (4, 2), "w2_b": (2, 4)}, "ranks differ: w1_a"),
        ({"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (4, 2), "w2_b": (2, 5)}, "two sides have shapes"),
        ({"w1_a": (4,), "w1_b": (2, 4), "w2_a": (4, 2), "w2_b": (2, 5)}, "expected a matrix"),
        ({"w1_a": (2, 4), "w1_b": (2, 4), "w2_a": (2, 4), "w2_b": (2, 4), "t1": (2, 2, 3, 3)}, "one of t1 and t2"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (FAMILY.problem(shapes) or "")


KERNELS = ("conv 3x3", "conv 3x1", "conv 1d")
OPTIONS = {
    "plain": {},
    "tucker": {"use_tucker": True},
    "rs_lora": {"rs_lora": True},
    "use_scalar": {"use_scalar": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_delta_equals_what_lycoris_trains_with(layer: str, rank: int, options: dict[str, bool]) -> None:
    """The reference is `get_weight`, which LyCORIS' forward adds to the base weight (`get_diff_weight` multiplies by
    alpha / rank a second time)."""
    trained = LohaModule("x", LAYERS[layer](), lora_dim=rank, alpha=2.0, **options)
    shuffle(trained)
    roles = stored(trained, NAMES)
    assert ("t1" in roles) == (bool(options.get("use_tucker")) and layer in KERNELS)
    module = module_of(FAMILY, roles, trained.shape, trained.state_dict()["alpha"].item())
    assert module.shape[0] == trained.shape[0] and prod(module.shape) == prod(trained.shape)
    with torch.no_grad():
        expected = trained.get_weight(trained.shape) * trained.scalar
        assert_same(module.delta().reshape(trained.shape), expected, "delta", 1e-6)


@pytest.mark.parametrize("name", SAMPLES)
def test_delta_equals_lycoris_function(name: str) -> None:
    roles, alpha = SAMPLES[name]
    loaded = {role: factor.load() for role, factor in roles.items()}
    scale = FAMILY.scale({role: factor.shape for role, factor in roles.items()}, alpha)
    order = (*(loaded[role] for role in ("w1_b", "w1_a", "w2_b", "w2_a")), loaded.get("t1"), loaded.get("t2"))
    assert_same(dense(FAMILY, roles, scale), diff_weight(*order, gamma=torch.tensor(scale)), name)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("layer", ["linear", "conv 1x1", "conv 3x3", "conv 1d"])
def test_delta_equals_peft(layer: str, effective: bool) -> None:
    base = LAYERS[layer]()
    kind = {"linear": peft.Linear, "conv 1d": peft.Conv1d}.get(layer, peft.Conv2d)
    config = LoHaConfig(r=3, alpha=2, use_effective_conv2d=effective, init_weights=False)
    trained = kind(base, "default", config=config, r=3, alpha=2)
    shuffle(trained)
    roles = stored(trained, {role: f"{key}.default" for role, key in NAMES.items()})
    assert ("t1" in roles) == (effective and layer in ("conv 3x3", "conv 1d"))
    module = module_of(FAMILY, roles, tuple(base.weight.shape), 2.0)
    with torch.no_grad():
        expected = trained.get_delta_weight("default")
        assert_same(module.delta().reshape(expected.shape), expected, layer, 1e-6)
