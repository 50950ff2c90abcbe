"""Modules of several adapters on the same targets: grouped, weighed, and shown to a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError, NotExact, NotRepresentable, UsageError
from loratool.core.module import Module
from loratool.core.registry import architectures, families, layouts
from loratool.core.tensor import LazyTensor
from loratool.ops.blocks import BlockWeights, Entry
from loratool.ops.convert import cast
from loratool.ops.inputs import Input
from loratool.ops.terms import Group, Seen, Term, group
from tests.builders import Weight, weight
from tests.contracts import assert_same

FLUX = architectures()["flux"]
QKV = weight("flux", "kohya", "double_blocks.0.img_attn.qkv")
PROJ = weight("flux", "kohya", "double_blocks.0.img_attn.proj")
PATH = "transformer.transformer_blocks.0.attn"
NOISE = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=NOISE) * 0.1


def lora(one: Weight, rank: int = 2, alpha: float | None = 1.0, height: int | None = None) -> Module:
    """Narrow where `height` says so: nothing here depends on the width."""
    rows = height or one.shape[0]
    factors = {"up": noise(rows, rank), "down": noise(rank, 48 if height else one.shape[1])}
    return Module(one.targets, families()["lora"], {r: LazyTensor.from_torch(f) for r, f in factors.items()}, alpha)


def lokr(one: Weight, w1: tuple[int, int], w2: tuple[int, int]) -> Module:
    factors = {"w1": LazyTensor.from_torch(noise(*w1)), "w2": LazyTensor.from_torch(noise(*w2))}
    return Module(one.targets, families()["lokr"], factors, None)


def adapter(*modules: Module, layout: str = "kohya", path: str = "a") -> Adapter:
    return Adapter(modules, FLUX, layout, path=path)


def blocks(*entries: tuple[str, float], rest: float = 1.0) -> BlockWeights:
    return BlockWeights("", FLUX, tuple(Entry(*entry) for entry in entries), rest)


def indices(groups: Sequence[Group]) -> list[tuple[str, list[int]]]:
    return [(one.first.targets[0].path.rpartition(".")[2], [term.index for term in one.terms]) for one in groups]


def test_groups_are_in_the_order_of_the_first_that_has_them() -> None:
    a, b = adapter(lora(QKV, height=144)), adapter(lora(PROJ, height=48), lora(QKV, height=144))
    groups, silent = group([Input(a, 0.5), Input(b, 2.0)], layouts()["kohya"], False)
    assert [(len(one.first.targets), [t.index for t in one.terms]) for one in groups] == [(3, [0, 1]), (1, [1])]
    assert [term.weight for term in groups[0].terms] == [0.5, 2.0] and silent == ()
    split, _ = group([Input(a), Input(b)], layouts()["diffusers"], False)
    assert indices(split) == [("to_q", [0, 1]), ("to_k", [0, 1]), ("to_v", [0, 1]), ("0", [1])]
    assert split[0].shape == (48, 48)


def test_what_has_no_weight() -> None:
    both = adapter(lora(QKV, height=144), lora(PROJ, height=48))
    off = blocks((f"{PATH}.to_q", 0.0))
    groups, silent = group([Input(both, 1.0, off), Input(both, 0.0)], layouts()["diffusers"], False)
    assert indices(groups) == [("to_k", [0]), ("to_v", [0]), ("0", [0])] and silent == (f"{PATH}.to_q",)
    fused, silent = group([Input(both, 1.0, off)], layouts()["kohya"], False)
    assert fused[0].terms[0].gains == (0.0, 1.0, 1.0) and fused[0].terms[0].gain is None and silent == ()
    voting, silent = group([Input(both, 1.0, off), Input(both, 0.0)], layouts()["diffusers"], False, voting=True)
    assert indices(voting) == [("to_k", [0, 1]), ("to_v", [0, 1]), ("0", [0, 1])] and silent == (f"{PATH}.to_q",)
    for some in ([Input(both, 0.0)], [Input(both, 1.0, blocks(rest=0.0))], [Input(both, 0.0), Input(both, -0.0)]):
        for voting_too in (False, True):
            with pytest.raises(UsageError, match="nothing is left"):
                group(some, layouts()["kohya"], False, voting_too)


def test_sizes_must_agree() -> None:
    a, b = adapter(lora(QKV, height=144)), adapter(lora(QKV), path="b")
    for second in (Input(b), Input(b, 0.0)):
        with pytest.raises(FormatError) as caught:
            group([Input(a), second], layouts()["kohya"], False)
        assert caught.value.file == "b" and "[9216, 3072]" in str(caught.value) and "[144, 48]" in str(caught.value)


def test_what_cannot_be_cut() -> None:
    """q, k and v of a LoKr whose blocks go across them: refused, or rewritten where that was asked for."""
    across, fits = lokr(QKV, (2, 4), (72, 12)), lokr(PROJ, (4, 4), (12, 12))
    inputs = [Input(adapter(across, fits))]
    with pytest.raises(NotRepresentable):
        group(inputs, layouts()["diffusers"], False)
    groups, _ = group(inputs, layouts()["diffusers"], True)
    rows = torch.cat([one.first.delta() for one in groups[:3]])
    assert_same(rows, across.delta(), "its rows", 1e-5)
    # Each says what it stands for; what needs no cutting stays what it is.
    terms = [one.terms[0] for one in groups]
    assert [term.kind for term in terms] == ["LoKr"] * 4
    assert [term.stands_for for term in terms] == [across] * 3 + [None]
    assert terms[3].module is fits and terms[0].own.product.rank == 12


def test_what_cannot_be_stacked() -> None:
    """q is a LoKr, k a LoRA of another dtype: as one module they are a pair."""
    q, k = (weight("flux", "diffusers", f"transformer_blocks.0.attn.{name}") for name in ("to_q", "to_k"))
    kron, plain = lokr(q, (4, 4), (12, 12)), cast(lora(k, height=48), "F16")
    inputs = [Input(adapter(kron, plain, layout="diffusers"))]
    with pytest.raises(NotExact, match="families") as caught:
        group(inputs, layouts()["kohya"], False)
    assert "--approximate" in str(caught.value)
    (one,), _ = group(inputs, layouts()["kohya"], True)
    assert one.terms[0].kind == "LoKr"
    assert_same(one.first.delta(), torch.cat([kron.delta(), plain.delta(), torch.zeros(48, 48)]), "qkv", 1e-5)


def test_a_tucker_core_that_cannot_be_stacked() -> None:
    parts = [weight("flux", "diffusers", f"transformer_blocks.0.attn.{name}") for name in ("to_q", "to_k")]
    shapes = {"up": (48, 3, 1, 1), "down": (2, 48, 1, 1), "mid": (3, 2, 1, 1)}
    modules = [
        Module(one.targets, families()["lora"], {r: LazyTensor.from_torch(noise(*s)) for r, s in shapes.items()}, 1.0)
        for one in parts
    ]
    (one,), _ = group([Input(adapter(*modules, layout="diffusers"))], layouts()["kohya"], True)
    assert one.terms[0].kind is None and one.first.rank == 6  # nothing is approximated
    meant = torch.cat([*(module.delta().flatten(1) for module in modules), torch.zeros(48, 48)])
    assert_same(one.first.delta().flatten(1), meant, "qkv", 1e-6)


def test_dtypes_of_what_is_fused() -> None:
    """q, k and v in three dtypes: the fused module has the one that holds them, and nothing is rounded."""
    parts = [weight("flux", "diffusers", f"transformer_blocks.0.attn.to_{name}") for name in "qkv"]
    dtypes = ("F16", "BF16", "F16")
    modules = [cast(lora(one, height=48), dtype) for one, dtype in zip(parts, dtypes, strict=True)]
    (one,), _ = group([Input(adapter(*modules, layout="diffusers"))], layouts()["kohya"], False)
    assert {factor.dtype for factor in one.first.factors.values()} == {"F32"}
    assert_same(one.first.delta(), torch.cat([module.delta() for module in modules]), "qkv", 1e-7)
    groups, _ = group([Input(adapter(*modules, layout="diffusers"))], layouts()["peft"], False)
    assert all(one.first is module for one, module in zip(groups, modules, strict=True))


@pytest.mark.parametrize("approximate", [False, True])
def test_no_hint_promises_what_does_not_help(approximate: bool) -> None:
    """A DoRA magnitude per column cannot be stacked, approximated or not."""
    q = lora(weight("flux", "diffusers", "transformer_blocks.0.attn.to_q"), height=48)
    columns = replace(q, magnitude=LazyTensor.from_torch(torch.ones(1, 48)))
    with pytest.raises(NotExact, match="magnitude") as caught:
        group([Input(adapter(columns, layout="diffusers"))], layouts()["comfyui"], approximate)
    assert "--approximate" not in str(caught.value)


def test_gains_scale_rows() -> None:
    one = lora(QKV, height=144)
    for gains in ((0.5, 0.5, 0.5), (0.0, -2.0, 1.0), (1.0, 1.0, 1.0)):
        term = Term(0, one, 1.0, gains)
        by_row = torch.tensor(gains).repeat_interleave(48)
        assert_same(term.gained(one.delta()), one.delta() * by_row[:, None], str(gains))
        assert_same(term.weighed().delta(), one.delta() * by_row[:, None], str(gains), 1e-6)
        assert_same(term.gained(torch.ones(144)), by_row, "a bias", 0.0)
        seen = Seen(0, one.title, (144, 48), term, torch.float64, unit=0.25)
        left, right = seen.pair()
        assert_same(left @ right * 0.25, term.weighed().delta(), str(gains), 1e-6)
        assert_same(seen.dense(), left @ right, "dense")
    assert Term(0, one, 1.0, (1.0, 1.0, 1.0)).weighed() is one


def test_kinds() -> None:
    plain, kron = lora(PROJ, height=48), lokr(PROJ, (4, 4), (12, 12))
    dora = Module(plain.targets, plain.family, plain.factors, 1.0, LazyTensor.from_torch(torch.ones(48, 1)))
    assert [Term(0, one, 1.0, (1.0,)).kind for one in (plain, kron, dora)] == [None, "LoKr", "DoRA"]
    assert [
        Seen(0, "", (48, 48), None if one is None else Term(0, one, 1.0, (1.0,)), torch.float32).known
        for one in (None, plain, kron, dora)
    ] == [True, True, True, False]


def test_an_input_without_the_module_is_zero() -> None:
    seen = Seen(1, "name", (48, 40), None, torch.float64)
    left, right = seen.pair()
    assert (left.shape, right.shape) == ((48, 0), (0, 40))
    assert not seen.dense().any() and seen.dense().shape == (48, 40) and seen.dense().dtype == torch.float64
    assert seen.dense() is not seen.dense()


def test_a_lokr_as_a_pair() -> None:
    kron = lokr(PROJ, (4, 4), (12, 12))
    left, right = Seen(0, "", (48, 48), Term(0, kron, 1.0, (0.5,)), torch.float64).pair()
    assert_same(left @ right, kron.delta() * 0.5, "kron", 1e-6)
