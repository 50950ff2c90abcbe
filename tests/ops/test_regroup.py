"""regroup: the hard cases of the design, and there and back again for random adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.core.errors import NotExact
from loratool.core.module import Module
from loratool.core.naming import Naming
from loratool.core.registry import architectures, families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor, same_bytes
from loratool.ops.regroup import regroup
from tests.builders import DTYPES

WIDTH = 24
"""Of a Flux model, 1/128 of the real one: the heights of fused weights keep the table's proportions."""

SHRINK = 3072 // WIDTH
FLUX = architectures()["flux"]
QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.0.linear1"
FINAL = "final_layer.adaLN_modulation.1"
Q, K, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")


def namings(naming: str) -> Mapping[str, Naming]:
    return {"transformer": FLUX.naming("transformer", naming)}


BFL, DIFFUSERS = namings("bfl"), namings("diffusers")


def targets_of(naming: str, name: str) -> tuple[Target, ...]:
    return FLUX.naming("transformer", naming)[name]


def lazy(tensor: torch.Tensor, dtype: str = "F32") -> LazyTensor:
    return LazyTensor.from_torch(tensor.to(DTYPES[dtype]).contiguous())


def lora(
    targets: Sequence[Target],
    rank: int,
    alpha: float | None = None,
    *,
    seed: int = 0,
    dtype: str = "F32",
    down: LazyTensor | None = None,
    zero: bool = False,
) -> Module:
    """A LoRA pair on these targets of the small model."""
    generator = torch.Generator().manual_seed(seed)
    height = sum(target.rows for target in targets) // SHRINK
    columns = targets[0].shape[1] // SHRINK
    up = torch.randn(height, rank, generator=generator)
    drawn = torch.randn(rank, columns, generator=generator)
    factors = {"up": lazy(up * 0 if zero else up, dtype), "down": down or lazy(drawn, dtype)}
    return Module(tuple(targets), families()["lora"], factors, alpha)


def split_part(path: str, rank: int, alpha: float | None = None, **more: object) -> Module:
    return lora(targets_of("diffusers", path), rank, alpha, **more)  # type: ignore[arg-type]


def deltas(modules: Sequence[Module]) -> dict[str, torch.Tensor]:
    """path of each target -> the dense update of its rows."""
    found = {}
    for module in modules:
        start, delta = 0, module.delta()
        for target, height in zip(module.targets, module.heights(), strict=True):
            found[target.path] = delta[start : start + height]
            start += height
    return found


def assert_same_update(left: Sequence[Module], right: Sequence[Module], tolerance: float = 1e-6) -> None:
    """Every target has the same update, one that only one side has is zero."""
    one, other = deltas(left), deltas(right)
    for path in {*one, *other}:
        if path not in one or path not in other:
            assert not (one.get(path, other.get(path)) != 0).any(), path  # type: ignore[union-attr]
            continue
        scale = float(one[path].abs().max()) or 1.0
        assert torch.allclose(one[path], other[path], rtol=tolerance, atol=tolerance * scale), path


def assert_same_modules(left: Sequence[Module], right: Sequence[Module]) -> None:
    """The same targets, alphas and bytes, in the same order."""
    assert [module.targets for module in left] == [module.targets for module in right]
    for one, other in zip(left, right, strict=True):
        assert one.alpha == other.alpha, one.title
        assert one.tensors.keys() == other.tensors.keys()
        assert all(same_bytes(tensor, other.tensors[role]) for role, tensor in one.tensors.items()), one.title


# -- one naming is enough -------------------------------------------------------------------------------------------


def test_a_module_that_fits_stays_the_very_same_object() -> None:
    modules = [lora(targets_of("bfl", QKV), 4), lora(targets_of("bfl", FINAL), 2, seed=1)]
    regrouped = regroup(modules, BFL)
    assert all(after is before for after, before in zip(regrouped.modules, modules, strict=True))
    embedder = split_part("x_embedder", 2)
    assert regroup([embedder], BFL).modules[0] is embedder


def test_the_order_of_the_file_is_kept() -> None:
    names = ["single_blocks.3.linear1", QKV, "double_blocks.7.txt_attn.qkv"]
    modules = [lora(targets_of("bfl", name), 2, seed=i) for i, name in enumerate(names)]
    there = regroup(modules, DIFFUSERS).modules
    assert [module.targets[0].path.partition(".attn")[0] for module in there] == [
        *["single_transformer_blocks.3"] * 3,
        "single_transformer_blocks.3.proj_mlp",
        *["transformer_blocks.0"] * 3,
        *["transformer_blocks.7"] * 3,
    ]
    assert [module.targets for module in regroup(there, BFL).modules] == [module.targets for module in modules]


# -- fused, split, swapped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [QKV, LINEAR1, "double_blocks.3.txt_attn.qkv"])
@pytest.mark.parametrize("alpha", [None, 4.0, 1.0])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_fused_weight_splits_and_comes_back_with_its_rank(name: str, alpha: float | None, dtype: str) -> None:
    fused = lora(targets_of("bfl", name), 4, alpha, dtype=dtype)
    parts = regroup([fused], DIFFUSERS).modules
    assert len(parts) == len(fused.targets)
    assert all(part.factors["down"] is fused.factors["down"] for part in parts)
    assert {(part.rank, part.scale, part.dtype) for part in parts} == {(4, fused.scale, dtype)}
    assert_same_update([fused], parts)
    assert_same_modules([fused], regroup(parts, BFL).modules)


def test_downs_are_compared_by_value() -> None:
    """Files store a copy of the shared down for every part."""
    fused = lora(targets_of("bfl", QKV), 4, 2.0)
    parts = [
        replace(part, factors={**part.factors, "down": lazy(part.factors["down"].load().clone())})
        for part in regroup([fused], DIFFUSERS).modules
    ]
    assert_same_modules([fused], regroup(parts, BFL).modules)


def test_parts_of_a_fused_weight_stack_their_ranks_and_split_again() -> None:
    parts = [split_part(Q, 4, 4.0), split_part(V, 8, 8.0, seed=1)]
    there = regroup(parts, BFL)
    (fused,) = there.modules
    assert fused.rank == 12
    assert fused.scale == 1.0
    up = fused.factors["up"].load()
    assert not up[WIDTH : 2 * WIDTH].any()  # k
    assert not up[:WIDTH, 4:].any() and not up[2 * WIDTH :, :4].any()  # block-diagonal
    assert_same_update(parts, [fused])
    for blocks in (None, there.blocks):
        back = regroup([fused], DIFFUSERS, blocks)
        assert_same_modules(parts, back.modules)
        assert back.vanished == (f"transformer.{K}",)


def test_one_part_alone_is_not_padded_with_rank() -> None:
    part = split_part(K, 3)
    (fused,) = regroup([part], BFL).modules
    assert (fused.rank, fused.shape) == (3, (3 * WIDTH, WIDTH))
    assert_same_update([part], [fused])


def test_shift_and_scale_swap_and_keep_the_rank() -> None:
    native = lora(targets_of("bfl", FINAL), 4, 2.0)
    (swapped,) = regroup([native], DIFFUSERS).modules
    assert [target.path for target in swapped.targets] == ["norm_out.linear:scale", "norm_out.linear:shift"]
    assert swapped.rank == 4
    before, after = native.delta(), swapped.delta()
    assert torch.equal(before[:WIDTH], after[WIDTH:]) and torch.equal(before[WIDTH:], after[:WIDTH])
    assert_same_modules([native], regroup([swapped], BFL).modules)


def test_open_clip_fuses_what_transformers_splits() -> None:
    table = architectures()["sdxl"]
    path = "text_model.encoder.layers.5.self_attn"
    hf, openclip = ({"text_encoder_2": table.naming("text_encoder_2", naming)} for naming in ("hf", "openclip"))
    parts = [
        Module(
            hf["text_encoder_2"][f"{path}.{part}_proj"],
            families()["lora"],
            {"up": lazy(torch.randn(1280, 2)), "down": lazy(torch.randn(2, 1280))},
            1.0,
        )
        for part in "qkv"
    ]
    there = regroup(parts, openclip)
    (fused,) = there.modules
    assert (fused.shape, fused.rank) == ((3840, 1280), 6)
    assert_same_modules(parts, regroup([fused], hf, there.blocks).modules)


def test_heights_that_cannot_be_divided_are_refused() -> None:
    factors = {"up": lazy(torch.randn(71, 2)), "down": lazy(torch.randn(2, 24))}
    odd = Module(targets_of("bfl", QKV), families()["lora"], factors)
    with pytest.raises(NotExact, match="71 rows cannot be divided"):
        regroup([odd], DIFFUSERS)


# -- untrained and mixed --------------------------------------------------------------------------------------------


def test_an_untrained_fused_module_splits_into_untrained_ones() -> None:
    fused = lora(targets_of("bfl", QKV), 4, 4.0, zero=True)
    there = regroup([fused], DIFFUSERS)
    assert len(there.modules) == 3 and not there.vanished
    assert_same_modules([fused], regroup(there.modules, BFL, there.blocks).modules)


def test_untrained_parts_survive_fusing() -> None:
    parts = [split_part(path, 4, 4.0, seed=i, zero=True) for i, path in enumerate((Q, K, V))]
    there = regroup(parts, BFL)
    assert there.modules[0].rank == 12
    assert_same_modules(parts, regroup(there.modules, DIFFUSERS, there.blocks).modules)
    alone = regroup(there.modules, DIFFUSERS)
    assert len(alone.modules) == 3 and not alone.vanished  # without a record, no part is taken away


def test_an_untrained_part_among_trained_ones_survives_with_the_record() -> None:
    parts = [split_part(Q, 4, 4.0), split_part(K, 2, 2.0, seed=1, zero=True), split_part(V, 4, 4.0, seed=2)]
    there = regroup(parts, BFL)
    assert_same_modules(parts, regroup(there.modules, DIFFUSERS, there.blocks).modules)


@pytest.mark.parametrize("alphas", [(4.0, 2.0), (4.0, 16.0), (None, 2.0), (1.0, 3.0), (0.7, 5.0)])
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_parts_with_other_alphas_share_one_scale(alphas: tuple[float | None, float], dtype: str) -> None:
    parts = [split_part(Q, 4, alphas[0], dtype=dtype), split_part(V, 4, alphas[1], seed=1, dtype=dtype)]
    there = regroup(parts, BFL)
    (fused,) = there.modules
    assert fused.scale in {part.scale for part in parts}
    assert_same_update(parts, [fused])
    back = regroup([fused], DIFFUSERS, there.blocks)
    assert_same_update(parts, back.modules)


def test_parts_of_scale_zero_stay_zero() -> None:
    parts = [split_part(Q, 4, 0.0), split_part(V, 4, 4.0, seed=1)]
    (fused,) = regroup(parts, BFL).modules
    assert fused.scale == 1.0
    assert_same_update(parts, [fused])


def test_parts_all_of_scale_zero_stay_zero() -> None:
    parts = [split_part(Q, 4, 0.0), split_part(V, 4, 0.0, seed=1)]
    (fused,) = regroup(parts, BFL).modules
    assert fused.scale == 0.0


def test_parts_of_other_dtypes_are_not_rounded_in_silence() -> None:
    parts = [split_part(Q, 4), split_part(V, 4, seed=1, dtype="BF16")]
    with pytest.raises(NotExact, match="different dtypes: BF16, F32"):
        regroup(parts, BFL)


# -- LoKr -----------------------------------------------------------------------------------------------------------


def lokr(targets: Sequence[Target], blocks: int, factored: bool = False, seed: int = 0) -> Module:
    """A Kronecker product of `blocks` row blocks."""
    generator = torch.Generator().manual_seed(seed)
    height = sum(target.rows for target in targets) // SHRINK
    columns = targets[0].shape[1] // SHRINK
    w1 = torch.randn(blocks, 4, generator=generator)
    factors = {"w1": lazy(w1)}
    if factored:
        factors = {"w1_a": lazy(torch.randn(blocks, 2, generator=generator)), "w1_b": lazy(w1[:2])}
    factors["w2"] = lazy(torch.randn(height // blocks, columns // 4, generator=generator))
    return Module(tuple(targets), families()["lokr"], factors, 2.0)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("blocks", [3, 6, 12])
def test_lokr_is_exact_at_block_borders(blocks: int, factored: bool) -> None:
    fused = lokr(targets_of("bfl", QKV), blocks, factored)
    parts = regroup([fused], DIFFUSERS).modules
    assert {part.family.id for part in parts} == {"lokr"}
    assert_same_update([fused], parts)
    assert_same_update([fused], regroup(parts, BFL).modules)
    (back,) = regroup(parts, BFL).modules
    assert back.scale == fused.scale
    assert_same_modules([replace(fused, alpha=None)], [replace(back, alpha=None)])  # no rank: alpha means nothing


def test_lokr_is_refused_inside_a_block() -> None:
    fused = lokr(targets_of("bfl", QKV), 4)  # blocks of 18 rows over parts of 24
    with pytest.raises(NotExact, match=r"rows 0:24 cut a Kronecker block of 18 rows"):
        regroup([fused], DIFFUSERS)


def test_lokr_of_the_real_size_names_the_rows() -> None:
    factors = {"w1": lazy(torch.randn(8, 8)), "w2": lazy(torch.randn(1152, 384))}
    fused = Module(targets_of("bfl", QKV), families()["lokr"], factors)
    with pytest.raises(NotExact, match=r"rows 0:3072 cut a Kronecker block of 1152 rows"):
        regroup([fused], DIFFUSERS)


def test_lokrs_of_their_own_cannot_be_stacked() -> None:
    parts = [lokr(targets_of("diffusers", path), 3, seed=i) for i, path in enumerate((Q, K, V))]
    with pytest.raises(NotExact, match="differ in w2"):
        regroup(parts, BFL)


def test_two_families_in_one_fused_weight_are_refused() -> None:
    parts = [split_part(Q, 2), lokr(targets_of("diffusers", V), 3)]
    with pytest.raises(NotExact, match=r"different families \(lokr, lora\)"):
        regroup(parts, BFL)


# -- DoRA -----------------------------------------------------------------------------------------------------------


def test_a_magnitude_per_row_splits_and_comes_back() -> None:
    magnitude = lazy(torch.rand(3 * WIDTH, 1))
    fused = replace(lora(targets_of("bfl", QKV), 4, 2.0), magnitude=magnitude)
    parts = regroup([fused], DIFFUSERS).modules
    rows = [part.magnitude.load() for part in parts if part.magnitude is not None]
    assert torch.equal(torch.cat(rows), magnitude.load())
    assert_same_modules([fused], regroup(parts, BFL).modules)


def test_a_magnitude_per_row_swaps_with_its_rows() -> None:
    magnitude = torch.rand(2 * WIDTH, 1)
    native = replace(lora(targets_of("bfl", FINAL), 4), magnitude=lazy(magnitude))
    (swapped,) = regroup([native], DIFFUSERS).modules
    assert swapped.magnitude is not None
    assert torch.equal(swapped.magnitude.load(), torch.cat([magnitude[WIDTH:], magnitude[:WIDTH]]))


def test_a_magnitude_per_column_is_refused() -> None:
    fused = replace(lora(targets_of("bfl", QKV), 4), magnitude=lazy(torch.rand(1, WIDTH)))
    with pytest.raises(NotExact, match="per input column"):
        regroup([fused], DIFFUSERS)
    parts = [replace(split_part(path, 2), magnitude=lazy(torch.rand(1, WIDTH))) for path in (Q, K, V)]
    with pytest.raises(NotExact, match="per input column"):
        regroup(parts, BFL)


def test_a_magnitude_for_some_parts_is_refused() -> None:
    parts = [replace(split_part(Q, 2), magnitude=lazy(torch.rand(WIDTH, 1))), split_part(V, 2)]
    with pytest.raises(NotExact, match="only some parts"):
        regroup(parts, BFL)


def test_a_bias_travels_with_its_rows() -> None:
    fused = lora(targets_of("bfl", QKV), 4, 2.0)
    fused = replace(fused, factors={**fused.factors, "bias": lazy(torch.randn(3 * WIDTH))})
    parts = regroup([fused], DIFFUSERS).modules
    assert [part.factors["bias"].shape for part in parts] == [(WIDTH,)] * 3
    assert_same_modules([fused], regroup(parts, BFL).modules)


# -- properties -----------------------------------------------------------------------------------------------------

FUSED = [QKV, "double_blocks.0.txt_attn.qkv", LINEAR1, FINAL, "double_blocks.1.img_attn.proj"]


@st.composite
def modules_in(draw: st.DrawFn, naming: str, one_scale: bool) -> list[Module]:
    """Random modules of one naming of the small model."""
    wanted = {target for name in FUSED for target in targets_of("bfl", name)}
    names = [name for name, targets in FLUX.naming("transformer", naming).items() if set(targets) <= wanted]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
    made = []
    for index, name in enumerate(chosen):
        rank = draw(st.integers(1, 5))
        alpha = float(rank) if one_scale else draw(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]))
        zero = draw(st.booleans()) if one_scale else False
        made.append(lora(targets_of(naming, name), rank, alpha, seed=index, dtype=dtype, zero=zero))
    return made


@settings(deadline=None, max_examples=60)
@given(modules=modules_in("bfl", one_scale=False))
def test_native_modules_come_back_bit_for_bit(modules: list[Module]) -> None:
    there = regroup(modules, DIFFUSERS)
    assert_same_update(modules, there.modules)
    assert_same_modules(modules, regroup(there.modules, BFL, there.blocks).modules)


@settings(deadline=None, max_examples=60)
@given(modules=modules_in("diffusers", one_scale=True))
def test_split_modules_come_back_bit_for_bit(modules: list[Module]) -> None:
    there = regroup(modules, BFL)
    assert_same_update(modules, there.modules)
    back = regroup(there.modules, DIFFUSERS, there.blocks).modules
    paths = {module.targets[0].path: module for module in modules}
    again = {module.targets[0].path: module for module in back}
    assert_same_modules(list(paths.values()), [again[path] for path in paths])
    assert paths.keys() == again.keys()


@settings(deadline=None, max_examples=60)
@given(modules=modules_in("diffusers", one_scale=False))
def test_split_modules_of_many_scales_keep_their_update(modules: list[Module]) -> None:
    tolerance = {"F32": 1e-6, "F16": 2e-3, "BF16": 2e-2}[modules[0].dtype]
    there = regroup(modules, BFL)
    assert_same_update(modules, there.modules, tolerance)
    assert_same_update(modules, regroup(there.modules, DIFFUSERS, there.blocks).modules, tolerance)
