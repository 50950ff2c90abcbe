"""LoKr: the family's contract, and its update against LyCORIS' own, which trains it."""

from __future__ import annotations

from math import prod

import pytest
import torch
from lycoris.functional.lokr import kron_weight
from lycoris.modules.lokr import LokrModule
from torch import nn

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Part
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.families.lokr import FAMILY
from tests.contracts import assert_same, check_family, dense

ROLES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def factors(seed: int = 0, **shapes: tuple[int, ...]) -> Factors:
    """Random factors by role, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        role: LazyTensor.from_torch(torch.randn(shape, generator=generator, dtype=torch.float64))
        for role, shape in shapes.items()
    }


SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "both whole": (factors(w1=(4, 2), w2=(6, 5)), 3.0),
    "w2 factored": (factors(w1=(4, 3), w2_a=(6, 2), w2_b=(2, 5)), 1.0),
    "w1 factored": (factors(w1_a=(4, 2), w1_b=(2, 3), w2=(6, 5)), 1.0),
    "both factored": (factors(w1_a=(4, 2), w1_b=(2, 3), w2_a=(6, 2), w2_b=(2, 5)), 4.0),
    "rank 1, odd sizes": (factors(w1=(3, 1), w2_a=(5, 1), w2_b=(1, 7)), 0.5),
    "no blocks": (factors(w1=(1, 1), w2=(7, 5)), None),
    "conv 3x3 whole": (factors(w1=(2, 3), w2=(4, 5, 3, 3)), None),
    "conv 1x1 whole": (factors(w1=(2, 3), w2=(4, 5, 1, 1)), None),
    "conv 3x1 whole, w1 factored": (factors(w1_a=(3, 2), w1_b=(2, 3), w2=(4, 5, 3, 1)), 1.0),
    "conv 3x3 flattened": (factors(w1=(2, 3), w2_a=(4, 2), w2_b=(2, 5 * 9)), 1.0),
    "conv 3x1 with its kernel": (factors(w1=(2, 3), w2_a=(4, 2), w2_b=(2, 5, 3, 1)), 1.0),
    "Tucker 3x3": (factors(w1=(2, 3), w2_a=(2, 4), w2_b=(2, 5), t2=(2, 2, 3, 3)), 1.0),
    "Tucker 1x3, both factored": (
        factors(w1_a=(3, 1), w1_b=(1, 2), w2_a=(1, 5), w2_b=(1, 3), t2=(1, 1, 1, 3)),
        0.25,
    ),
}


def test_contract() -> None:
    check_family(FAMILY, SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_delta_equals_lycoris_kron_weight(name: str) -> None:
    stored, alpha = SAMPLES[name]
    loaded = [stored[role].load() if role in stored else None for role in ROLES]
    scale = FAMILY.scale({role: factor.shape for role, factor in stored.items()}, alpha)
    assert_same(dense(FAMILY, stored, scale), kron_weight(*loaded, scale=scale), name)


def test_rows_are_cut_between_blocks_only() -> None:
    stored = SAMPLES["w2 factored"][0]
    assert FAMILY.rows(stored, 6, 18)["w1"].shape == (2, 3)
    with pytest.raises(NotExact, match="rows 3:18 cut a Kronecker block of 6 rows"):
        FAMILY.rows(stored, 3, 18)


def test_parts_with_one_w2_stack_and_others_do_not() -> None:
    first = factors(1, w1=(4, 2), w2_a=(6, 2), w2_b=(2, 5))
    copies = {role: LazyTensor.from_torch(first[role].load().clone()) for role in ("w2_a", "w2_b")}
    second = {**copies, **factors(2, w1=(3, 2))}
    stacked = FAMILY.stacked([Part(24, first), Part(18, second)])
    assert stacked["w1"].shape == (7, 2)
    assert_same(dense(FAMILY, stacked), torch.cat([dense(FAMILY, first), dense(FAMILY, second)]), "stack")
    for other in (factors(3, w1=(3, 2), w2_a=(6, 2), w2_b=(2, 5)), None):
        with pytest.raises(NotExact, match="cannot be stacked"):
            FAMILY.stacked([Part(24, first), Part(18, other)])


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"w1": (2, 2)}, "no w2"),
        ({"w2": (2, 2)}, "no w1"),
        ({"w1": (2, 2), "w2_a": (4, 2)}, "no w2"),
        ({"w1_b": (2, 2), "w2": (4, 2)}, "no w1"),
        ({"w1": (2, 2), "w2": (2, 2), "w2_a": (2, 2)}, "whole and as a product"),
        ({"w1": (2, 2), "w2_a": (4, 2), "w2_b": (3, 2)}, "ranks differ"),
        ({"w1_a": (2, 1), "w1_b": (2, 2), "w2": (2, 2)}, "ranks differ"),
        ({"w1": (2,), "w2": (2, 2)}, "no matrix"),
        ({"w1": (2, 2), "w2": (2, 2), "t2": (2, 2, 3, 3)}, "beside a whole w2"),
        ({"w1": (2, 2), "w2_a": (2, 4), "w2_b": (2, 4), "t2": (3, 2, 3, 3)}, "t2 has shape"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (FAMILY.problem(shapes) or "")


LAYERS = {
    "linear": lambda: nn.Linear(30, 48),
    "odd linear": lambda: nn.Linear(35, 49),
    "prime linear": lambda: nn.Linear(13, 17),
    "conv 1x1": lambda: nn.Conv2d(24, 36, 1),
    "conv 3x3": lambda: nn.Conv2d(24, 36, 3),
    "conv 3x2": lambda: nn.Conv2d(24, 35, (3, 2)),
    "conv 1d": lambda: nn.Conv1d(24, 36, 3),
}
OPTIONS = {
    "plain": {},
    "decompose_both": {"decompose_both": True},
    "full_matrix": {"full_matrix": True},
    "factor 4": {"factor": 4},
    "factor 4, both": {"factor": 4, "decompose_both": True},
    "unbalanced": {"factor": 4, "unbalanced_factorization": True},
    "w1 factored, w2 whole": {"factor": 4, "unbalanced_factorization": True, "decompose_both": True},
    "tucker": {"use_tucker": True},
    "use_scalar": {"use_scalar": True, "use_tucker": True},
    "rs_lora": {"rs_lora": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_delta_equals_what_lycoris_trains_with(layer, rank: int, options: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    """The reference is `get_weight`, which LyCORIS' forward adds to the base weight (`get_diff_weight`, and with it
    its merge, multiply by alpha / rank a second time)."""
    torch.manual_seed(0)
    trained = LokrModule("x", layer(), lora_dim=rank, alpha=2.0, **options)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    whole = trained.use_w1 and trained.use_w2
    state = {key: LazyTensor.from_torch(tensor.detach()) for key, tensor in trained.state_dict().items()}
    stored = {role: state[f"lokr_{role}"] for role in ROLES if f"lokr_{role}" in state}
    shapes = {role: factor.shape for role, factor in stored.items()}
    assert FAMILY.problem(shapes) is None
    assert whole or FAMILY.rank(shapes) == rank
    module = Module((Target("unet", "x", trained.shape),), FAMILY, stored, state["alpha"].item())
    assert module.shape[0] == trained.shape[0]
    assert prod(module.shape) == prod(trained.shape)
    if whole and options.get("rs_lora"):
        # sqrt(rank) is in LyCORIS' forward, but no reader of the file can know it, LyCORIS' own included.
        trained.scale = 1.0
    with torch.no_grad():
        expected = trained.get_weight(trained.shape) * trained.scalar
        assert_same(module.delta().reshape(trained.shape), expected, "delta", 1e-6)
