"""LoRA: the family's contract, and its update against LyCORIS' own, which trains it."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.locon import LoConModule
from torch import nn

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Part
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.families.lora import FAMILY
from tests.contracts import assert_same, check_family, dense


def factors(seed: int = 0, dtype: torch.dtype = torch.float64, **shapes: tuple[int, ...]) -> Factors:
    """Random factors by role."""
    generator = torch.Generator().manual_seed(seed)
    return {
        role: LazyTensor.from_torch(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for role, shape in shapes.items()
    }


SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "linear": (factors(up=(12, 4), down=(4, 10)), 2.0),
    "rank 1, odd sizes": (factors(up=(7, 1), down=(1, 5)), 0.5),
    "rank above both sizes": (factors(up=(3, 8), down=(8, 5)), None),
    "conv 1x1": (factors(up=(6, 2, 1, 1), down=(2, 5, 1, 1)), 1.0),
    "conv 3x3": (factors(up=(6, 3, 1, 1), down=(3, 5, 3, 3)), 6.0),
    "conv 3x1": (factors(up=(7, 3, 1, 1), down=(3, 5, 3, 1)), None),
    "conv 1d": (factors(up=(6, 2, 1), down=(2, 5, 3)), 1.0),
    "conv 3d": (factors(up=(4, 2, 1, 1, 1), down=(2, 3, 3, 1, 2)), 1.0),
    "Tucker 3x3": (factors(up=(6, 3, 1, 1), down=(3, 5, 1, 1), mid=(3, 3, 3, 3)), 1.5),
    "Tucker 1x3": (factors(up=(7, 1, 1, 1), down=(1, 4, 1, 1), mid=(1, 1, 1, 3)), 1.0),
    "embedding": (factors(embedding_A=(3, 11), embedding_B=(6, 3)), 1.0),
    "bias": (factors(up=(9, 4), down=(4, 6), bias=(9,)), 8.0),
    "conv with bias": (factors(up=(6, 2, 1, 1), down=(2, 4, 3, 3), bias=(6,)), 2.0),
}


def test_contract() -> None:
    check_family(FAMILY, SAMPLES, optional=("mid", "bias"))


def test_the_bias_is_cut_and_stacked_with_its_rows() -> None:
    whole = SAMPLES["bias"][0]
    upper, lower = FAMILY.rows(whole, 0, 4), FAMILY.rows(whole, 4, 9)
    assert torch.equal(lower["bias"].load(), whole["bias"].load()[4:])
    stacked = FAMILY.stacked([Part(4, upper), Part(2, None), Part(5, lower, 0.5)])
    bias = whole["bias"].load()
    assert torch.equal(stacked["bias"].load(), torch.cat([bias[:4], bias.new_zeros(2), bias[4:] * 0.5]))


def test_only_some_parts_with_a_bias_stack_to_zeros_for_the_others() -> None:
    with_bias = factors(up=(4, 2), down=(2, 3), bias=(4,))
    without = factors(1, up=(4, 2), down=(2, 3))
    for parts in ([with_bias, without], [without, with_bias]):
        stacked = FAMILY.stacked([Part(4, part) for part in parts])
        expected = [part["bias"].load() if "bias" in part else torch.zeros(4, dtype=torch.float64) for part in parts]
        assert torch.equal(stacked["bias"].load(), torch.cat(expected))


def test_equal_downs_are_shared_and_others_add_their_ranks() -> None:
    first, second = factors(1, up=(4, 2), down=(2, 6)), factors(2, up=(5, 3), down=(3, 6))
    copy = {"up": factors(3, up=(6, 2))["up"], "down": LazyTensor.from_torch(first["down"].load().clone())}
    stacked = FAMILY.stacked([Part(4, first), Part(5, second), Part(6, copy)])
    assert stacked["down"].shape == (5, 6)
    assert_same(dense(FAMILY, stacked), torch.cat([dense(FAMILY, part) for part in (first, second, copy)]), "stack")
    assert FAMILY.live(FAMILY.rows(stacked, 4, 9)) == (2, 3, 4)


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (SAMPLES["Tucker 3x3"][0], SAMPLES["Tucker 3x3"][0], "Tucker"),
        (SAMPLES["embedding"][0], SAMPLES["embedding"][0], "embedding"),
        (factors(up=(4, 2), down=(2, 6)), factors(up=(4, 2), down=(2, 5)), "input"),
        (factors(up=(4, 2), down=(2, 6)), factors(dtype=torch.float32, up=(4, 2), down=(2, 6)), "dtype"),
    ],
)
def test_what_cannot_be_stacked_says_why(one: Factors, other: Factors, why: str) -> None:
    with pytest.raises(NotExact, match=why):
        FAMILY.stacked([Part(4, one), Part(4, other)])


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"up": (4, 2)}, "no down"),
        ({"down": (2, 4)}, "no up"),
        ({"embedding_A": (2, 4)}, "no embedding_B"),
        ({"mid": (2, 2, 3, 3)}, "no up"),
        ({"up": (4, 2), "down": (3, 4)}, "ranks differ"),
        ({"up": (4,), "down": (3, 4)}, "expected a matrix"),
        ({"up": (4, 0), "down": (0, 4)}, "expected a matrix"),
        ({"up": (4, 2, 3, 3), "down": (2, 4, 1, 1)}, "kernel of 1x1"),
        ({"up": (4, 2), "down": (2, 4), "bias": (5,)}, "bias has shape"),
        ({"up": (4, 2, 1, 1), "down": (2, 4, 1, 1), "mid": (3, 2, 3, 3)}, "mid has shape"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (FAMILY.problem(shapes) or "")


LAYERS = {
    "linear": lambda: nn.Linear(10, 14),
    "odd linear": lambda: nn.Linear(5, 7),
    "conv 1x1": lambda: nn.Conv2d(6, 9, 1),
    "conv 3x3": lambda: nn.Conv2d(5, 8, 3),
    "conv 3x1": lambda: nn.Conv2d(5, 7, (3, 1)),
    "conv 1d": lambda: nn.Conv1d(5, 8, 3),
    "conv 3d": lambda: nn.Conv3d(3, 4, (1, 2, 3)),
    "grouped conv": lambda: nn.Conv2d(6, 9, 3, groups=3),
}


@pytest.mark.parametrize("options", [{}, {"use_tucker": True}, {"rs_lora": True}, {"use_scalar": True}], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_delta_equals_lycoris(layer, rank: int, options: dict[str, bool]) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    trained = LoConModule("x", layer(), lora_dim=rank, alpha=2.0, **options)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    state = {key: LazyTensor.from_torch(tensor.detach()) for key, tensor in trained.state_dict().items()}
    roles = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
    stored = {role: state[key] for role, key in roles.items() if key in state}
    assert FAMILY.problem({role: factor.shape for role, factor in stored.items()}) is None
    module = Module((Target("unet", "x", trained.shape),), FAMILY, stored, state["alpha"].item())
    with torch.no_grad():
        assert_same(module.delta(), trained.get_diff_weight()[0], "delta", 1e-6)
