"""merge: the weighted sum is exact whatever the inputs look like, the rest is refused or reported."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError, NotExact, NotRepresentable, UsageError
from loratool.core.module import Module
from loratool.core.ranges import TooLarge
from loratool.core.registry import architectures, families, layouts, methods
from loratool.core.tensor import LazyTensor, code_of
from loratool.ops.blocks import BlockWeights, Entry
from loratool.ops.conflicts import sign_conflicts
from loratool.ops.convert import cast
from loratool.ops.inputs import Input
from loratool.ops.low_rank import low_rank
from loratool.ops.merge import Merged, merge
from loratool.ops.open import understand
from loratool.ops.ranks import Limits, parse_rule
from loratool.ops.spell import spell
from loratool.ops.terms import common_dtype
from loratool.ops.weights import BaseWeights
from tests.builders import ARCHITECTURES, LAYOUTS, Part, Weight, build, random_parts, weight, weights

METHODS = methods()
CONCAT = METHODS["concat"]
ROUNDING = {"F64": 1e-12, "F32": 1e-6, "F16": 2e-3, "BF16": 1.5e-2}
"""How far factors of a dtype are from exact ones, relative to the norm of the terms."""

Pair = tuple[Tensor, Tensor]
Rows = Mapping[tuple[str, str], Pair]
"""(component, path of the target) -> factors of the float64 update of its rows."""


# -- what should come out, computed from the stored factors alone -----------------------------------------------------


def factors_of(module: Module) -> Pair:
    """Two float64 matrices whose product is the module's update."""
    found = {role: factor.load().double() for role, factor in module.factors.items()}
    if module.family.id == "lokr":
        return module.family.delta(found, module.scale).flatten(1), torch.eye(module.delta_width, dtype=torch.float64)
    if "embedding_A" in found:
        return found["embedding_A"].T * module.scale, found["embedding_B"].T
    down = found["down"].flatten(1)
    if "mid" in found:
        down = torch.einsum("pqk,qi->pik", found["mid"].flatten(2), down).flatten(1)
    return found["up"].flatten(1) * module.scale, down


def rows_of(adapter: Adapter, weight: float = 1.0, blocks: BlockWeights | None = None) -> Rows:
    found = {}
    for module in adapter.modules:
        left, right = factors_of(module)
        for target, part in zip(module.targets, left.split(module.heights()), strict=True):
            gain = weight * (blocks.of(target) if blocks is not None else 1.0)
            found[target.component, target.path] = part * gain, right
    return found


def norm(left: Tensor, right: Tensor) -> float:
    return float((torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T).norm())


def side_by_side(pairs: Sequence[Pair]) -> Pair:
    return torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs])


def assert_is_the_sum(adapter: Adapter, inputs: Sequence[Input], tolerance: float) -> None:
    terms = [rows_of(one.adapter, one.weight, one.blocks) for one in inputs]
    made = rows_of(adapter)
    for key in {key for rows in (made, *terms) for key in rows}:
        own = [rows[key] for rows in terms if key in rows]
        gross = sum(norm(*pair) for pair in own)
        off = [(-left, right) for left, right in own] + ([made[key]] if key in made else [])
        assert norm(*side_by_side(off)) <= tolerance * gross, key


def exact_sum(adapters: Sequence[Adapter], strengths: Sequence[float]) -> Tensor:
    """Dense, of adapters with one module each."""
    pairs = [factors_of(one.modules[0]) for one in adapters]
    return sum((w * left @ right for w, (left, right) in zip(strengths, pairs, strict=True)), torch.zeros(()))


def delta(merged: Merged) -> Tensor:
    (module,) = merged.adapter.modules
    left, right = factors_of(module)
    return left @ right


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# -- inputs -----------------------------------------------------------------------------------------------------------


NOISE = torch.Generator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers whichever tests ran before."""
    NOISE.manual_seed(0)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=NOISE) * 0.1).to(dtype)


def module(
    one: Weight, factors: Mapping[str, Tensor], alpha: float | None = None, family: str = "lora", **more: Any
) -> Module:
    lazy = {role: LazyTensor.from_torch(factor.contiguous()) for role, factor in factors.items()}
    return Module(one.targets, families()[family], lazy, alpha, **more)


def lora(one: Weight, rank: int = 4, alpha: float | None = 2.0, dtype: torch.dtype = torch.float32) -> Module:
    out, *rest = one.shape
    ones = (1,) * (len(rest) - 1)
    return module(one, {"up": noise(out, rank, *ones, dtype=dtype), "down": noise(rank, *rest, dtype=dtype)}, alpha)


def adapter(
    *modules: Module, architecture: str = "sd15", layout: str = "kohya", path: str = "a.safetensors"
) -> Adapter:
    return Adapter(modules, architectures()[architecture], layout, path=path)


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def attention(layout: str = "kohya") -> Weight:
    return weight("sd15", layout, ATTENTION)


def conv() -> Weight:
    return weight("sd15", "kohya", "down_blocks.0.resnets.0.conv1")


def one(rank: int = 4, alpha: float | None = 2.0, dtype: torch.dtype = torch.float32) -> Adapter:
    return adapter(lora(attention(), rank, alpha, dtype))


def summed(adapters: Sequence[Adapter], strengths: Sequence[float], method: str = "concat", **options: Any) -> Merged:
    inputs = [Input(one, strength) for one, strength in zip(adapters, strengths, strict=True)]
    return merge(inputs, METHODS[method], **options)


# -- the sum is exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(12))
def test_any_inputs(architecture: str, seed: int) -> None:
    """Layouts, ranks, alphas, dtypes, strengths, block weights and modules at random."""
    rng = random.Random(f"{architecture} {seed}")
    pool = {t for part in random_parts(rng, architecture, "kohya", 5) for t in part.weight.targets}
    inputs = []
    for index in range(rng.choice((1, 2, 2, 3))):
        layout, dtype = rng.choice(LAYOUTS), rng.choice(("F32", "F16", "BF16", "F64"))
        alphas = (1.0, 3.0, 16.0, *((0.0, -2.0, 1e-6, None) if layout == "kohya" else ()))
        parts = [
            Part(one, rng.choice((1, 2, 3, 5)), rng.choice(alphas), dtype)
            for one in weights(architecture, layout)
            if pool & set(one.targets) and (rng.random() < 0.7 or not index)
        ]
        if not parts:
            continue
        read = understand(build(parts, layout, seed=seed * 10 + index), architectures()[architecture], layout).adapter
        picked = rng.sample(sorted(pool, key=lambda target: target.path), 2)
        entries = tuple(Entry(f"{t.component}.{t.path}", rng.choice((0.0, 0.5, -2.0, 1.0))) for t in picked)
        blocks = BlockWeights("", read.architecture, entries, 1.0) if rng.random() < 0.5 else None
        inputs.append(Input(read, rng.choice((1.0, 1.0, 0.3, -0.7, 2.0)), blocks))
    to = rng.choice((None, *LAYOUTS))
    merged = merge(inputs, CONCAT, to=to)
    coarsest = max(ROUNDING[m.dtype] for m in merged.adapter.modules)
    assert_is_the_sum(merged.adapter, inputs, coarsest)
    assert merged.adapter.layout == (to or inputs[0].adapter.layout)
    assert merged.error == 0.0 and set(merged.planned) == {0.0}
    for row, made in zip(merged.modules, merged.adapter.modules, strict=True):
        assert row.title == made.title and row.rank_after == made.rank
        assert made.rank <= min(made.shape[0], made.delta_width, sum(rank or 0 for rank in row.ranks))
        assert made.dtype == code_of(made.factors["up"].load().dtype)
    # What is written is what was made.
    spelled = spell(merged.adapter, merged.adapter.layout)
    again = layouts()[merged.adapter.layout].read(spelled.bundle, merged.adapter.architecture)
    assert_is_the_sum(again, inputs, coarsest)


ALPHAS = (None, 0.0, -3.0, 1.0, 1e-3, 1e-8, 1e-40, 1e6)
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("other", (None, 2.0, -1e-12, 1e6))
@pytest.mark.parametrize("dtype", TYPES)
def test_alphas(alpha: float | None, other: float | None, dtype: str) -> None:
    """Whatever the scales are, the sum is right and every factor is finite."""
    inputs = [Input(one(4, alpha, TYPES[dtype]), 0.7), Input(one(3, other, TYPES[dtype]), -1.5)]
    made = merge(inputs, CONCAT).adapter
    assert_is_the_sum(made, inputs, ROUNDING[dtype])
    assert {factor.dtype for factor in made.modules[0].factors.values()} == {dtype}


@pytest.mark.parametrize("dtypes", [("F16", "BF16"), ("BF16", "F32"), ("F16", "F64"), ("F32", "F64"), ("F16", "F16")])
def test_dtypes(dtypes: tuple[str, str]) -> None:
    inputs = [Input(one(dtype=TYPES[name])) for name in dtypes]
    wide = common_dtype(dtypes)
    made = merge(inputs, CONCAT).adapter
    assert made.modules[0].dtype == wide == {"F16BF16": "F32", "F16F16": "F16"}.get("".join(dtypes), dtypes[1])
    assert_is_the_sum(made, inputs, ROUNDING[wide])
    told = merge(inputs, CONCAT, dtype="BF16").adapter
    assert {f.dtype for f in told.modules[0].factors.values()} == {"BF16"}
    assert_is_the_sum(told, inputs, ROUNDING["BF16"])


def test_common_dtype() -> None:
    assert common_dtype(["F8_E4M3", "F8_E4M3"]) == "F8_E4M3"
    assert common_dtype(["F8_E4M3", "F8_E5M2"]) == "F16"
    assert common_dtype(["F8_E4M3", "BF16"]) == "BF16"
    assert common_dtype(["F16", "BF16", "F64"]) == "F64"


def test_factors_of_different_dtypes_keep_the_finer() -> None:
    up, down = noise(320, 4).half(), noise(4, 320)
    mixed = adapter(module(attention(), {"up": up, "down": down}, 4.0))
    inputs = [Input(mixed), Input(one(dtype=torch.float16))]
    made = merge(inputs, CONCAT).adapter
    assert {factor.dtype for factor in made.modules[0].factors.values()} == {"F32"}
    assert_is_the_sum(made, inputs, ROUNDING["F32"])


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_eight_bits(code: str, strength: float) -> None:
    inputs = [Input(adapter(cast(lora(attention()), code)), w) for w in (1.0, strength)]
    made = merge(inputs, CONCAT).adapter
    assert made.modules[0].dtype == code
    assert_is_the_sum(made, inputs, 0.1)


def test_linear_in_the_inputs() -> None:
    a, b = one(), one(3, 1.0)
    whole = delta(summed([a, b], [1.3, -0.4]))
    doubled = adapter(cast(replace(a.modules[0], alpha=4.0), "F64"))
    assert relative(delta(summed([doubled, b], [0.65, -0.4])), whole) < 1e-6
    assert relative(delta(summed([b, a], [-0.4, 1.3])), whole) < 1e-6
    assert relative(delta(summed([a, b], [2.6, -0.8])), 2 * whole) < 1e-6
    nested = summed([a, b], [1.3, -0.4]).adapter
    assert relative(delta(summed([nested, a], [1.0, -1.3])), -0.4 * exact_sum([b], [1.0])) < 1e-5


def test_one_input_is_itself() -> None:
    parts = [Part(one, 3, 2.0, "BF16") for one in weights("sdxl", "kohya")[::40]]
    bundle = build(parts, "kohya")
    read = understand(bundle, architectures()["sdxl"], "kohya").adapter
    merged = merge([Input(read)], CONCAT)
    assert all(new is old for new, old in zip(merged.adapter.modules, read.modules, strict=True))
    written = spell(merged.adapter, "kohya").bundle.tensors
    assert {k: bytes(t.read()) for k, t in written.items()} == {k: bytes(t.read()) for k, t in bundle.tensors.items()}
    for name in ("diffusers", "peft", "comfyui"):
        other = merge([Input(read)], CONCAT, to=name).adapter
        assert [m.factors for m in other.modules] == [m.factors for m in read.modules]


def test_an_input_beside_one_of_strength_0_is_itself() -> None:
    a, b = one(), one(3)
    merged = summed([a, b], [1.0, 0.0])
    assert merged.adapter.modules[0] is a.modules[0]
    assert merged.modules[0].ranks == (4, None)


# -- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.3, 0.7), (1.0, -0.25)])
def test_equal_adapters_give_the_rank_of_one(dtype: str, strengths: tuple[float, float]) -> None:
    a = one(dtype=TYPES[dtype])
    merged = summed([a, a], strengths)
    assert merged.modules[0].rank_after == 4
    assert relative(delta(merged), exact_sum([a], [sum(strengths)])) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_an_adapter_and_its_opposite_leave_zeros(dtype: str) -> None:
    a = one(dtype=TYPES[dtype])
    merged = summed([a, a], [0.7, -0.7])
    assert merged.modules[0].rank_after == 1 and merged.modules[0].norm == 0.0
    assert not delta(merged).any()
    assert merged.cosines["unet"][0][1] == pytest.approx(1.0)


def dependent(kind: str, size: float, work: torch.dtype) -> tuple[Adapter, Adapter, int]:
    """Two adapters of rank 4 on one weight whose factors depend on each other, and the rank of their sum."""
    up, down, up2, down2 = (noise(*s, dtype=torch.float64) for s in ((320, 4), (4, 320), (320, 4), (4, 320)))
    rank = 8
    if kind == "shared downs":
        down2, rank = down, 4
    elif kind == "shared ups":
        up2, rank = up, 4
    elif kind == "nearly shared downs":
        down2 = down + size * down2
    elif kind == "nearly shared ups":
        up2 = up + size * up2
    elif kind == "both nearly shared":
        up2, down2 = up + size * up2, down + size * down2
    elif kind == "zero columns":
        up[:, 1:3] = 0
        down2[2] = 0
        rank = 5
    elif kind == "small and large columns":
        up2[:, 0] *= size
    a, b = (adapter(module(attention(), {"up": u.to(work), "down": d.to(work)}, 4.0)) for u, d in
            ((up, down), (up2, down2)))  # fmt: skip
    return a, b, rank


KINDS = ("shared downs", "shared ups", "nearly shared downs", "nearly shared ups", "both nearly shared",
         "zero columns", "small and large columns")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("work", TYPES)
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (1.0, -1.0)])
def test_no_rank_is_lost_that_carries_anything(
    kind: str, size: float, work: str, strengths: tuple[float, float]
) -> None:
    a, b, rank = dependent(kind, size, TYPES[work])
    merged = summed([a, b], strengths, dtype="F64")
    found, meant = delta(merged), exact_sum([a, b], strengths)
    gross = float(exact_sum([a], [1.0]).norm())
    # To the precision of the computation, relative to the terms: nothing that was there is cut off.
    assert float((found - meant).norm()) <= (1e-12 if work in ("F32", "F64") else 1e-6) * gross
    if "nearly" not in kind:
        assert merged.modules[0].rank_after == rank
    assert merged.modules[0].error == 0.0


def test_more_ranks_than_the_weight_has() -> None:
    time_proj = weight("sd15", "kohya", "conv_out")  # 4 rows
    many = [adapter(lora(time_proj, 3)) for _ in range(4)]
    merged = summed(many, [1.0, -0.5, 0.25, 2.0])
    assert merged.modules[0].rank_after == 4
    assert relative(delta(merged), exact_sum(many, [1.0, -0.5, 0.25, 2.0])) < 1e-6


def test_an_untrained_input_changes_nothing() -> None:
    a, zero = one(), adapter(module(attention(), {"up": torch.zeros(320, 4), "down": noise(4, 320)}, 4.0))
    merged = summed([zero, a], [1.0, 1.0])
    assert merged.modules[0].rank_after == 4
    assert relative(delta(merged), exact_sum([a], [1.0])) < 1e-6
    alone = summed([zero, zero], [1.0, 0.5])
    assert alone.modules[0].rank_after == 1 and not delta(alone).any()
    assert alone.error == 0.0


# -- layouts and kinds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("kohya", "diffusers"), ("diffusers", "kohya"), ("peft", "comfyui")])
def test_fused_and_split(first: str, second: str) -> None:
    """Flux: qkv in one tensor meets q, k, v in three, with different alphas, in either order."""
    fused = [Part(weight("flux", "kohya", f"double_blocks.0.{s}_attn.qkv"), 3, 1.5, "F16") for s in ("img", "txt")]
    fused.append(Part(weight("flux", "kohya", "single_blocks.1.linear1"), 2, 4.0, "F16"))
    blocks = {"transformer_blocks.0": ("to_q", "to_v", "add_k_proj"), "single_transformer_blocks.1": ("to_q", "to_k")}
    split = [
        Part(weight("flux", "diffusers", f"{block}.attn.{name}"), rank, alpha, "F16")
        for block, names in blocks.items()
        for name, rank, alpha in zip(names, (2, 3, 1), (2.0, 1.0, 5.0), strict=False)
    ]
    read = {}
    for index, (parts, own) in enumerate(((fused, "kohya"), (split, "diffusers"))):
        made = understand(build(parts, own, seed=index), architectures()["flux"], own).adapter
        for layout in (own, "comfyui" if own == "kohya" else "peft"):
            spelled = spell(made, layout)
            read[layout] = layouts()[layout].read(spelled.bundle, made.architecture)
    inputs = [Input(read[first], 0.8), Input(read[second], -0.6)]
    for to in LAYOUTS:
        made = merge(inputs, CONCAT, to=to).adapter
        assert_is_the_sum(made, inputs, ROUNDING["F16"])
        assert len({(m.component, m.targets) for m in made.modules}) == len(made.modules)


def test_a_convolution_stored_as_a_linear() -> None:
    """1x1 and 3x3 kernels flattened in one file, not in the other: in the form of the first."""
    point = weight("sd15", "kohya", "down_blocks.0.attentions.0.proj_in")
    for target in (point, conv()):
        whole = lora(target, 3)
        flat = module(target, {"up": noise(320, 2), "down": noise(2, math.prod(target.shape[1:]))}, 1.0)
        for modules in ((whole, flat), (flat, whole)):
            inputs = [Input(adapter(one), w) for one, w in zip(modules, (1.0, -0.3), strict=True)]
            made = merge(inputs, CONCAT).adapter
            assert len(made.modules[0].factors["down"].shape) == len(modules[0].factors["down"].shape)
            assert_is_the_sum(made, inputs, ROUNDING["F32"])


def tucker(rank: int = 3) -> Module:
    shapes = {"up": (320, rank, 1, 1), "down": (rank, 320, 1, 1), "mid": (rank, rank, 3, 3)}
    return module(conv(), {role: noise(*shape) for role, shape in shapes.items()}, 2.0)


def test_tucker() -> None:
    core, plain = tucker(), lora(conv(), 2)
    for modules in ((core, plain), (plain, core), (core, tucker(2))):
        inputs = [Input(adapter(one), w) for one, w in zip(modules, (0.7, -1.0), strict=True)]
        merged = merge(inputs, CONCAT)
        assert_is_the_sum(merged.adapter, inputs, ROUNDING["F32"])
        assert set(merged.adapter.modules[0].factors) == {"up", "down"} and merged.error == 0.0
    assert merge([Input(adapter(core))], CONCAT).adapter.modules[0] is core
    scaled = merge([Input(adapter(core), -0.5)], CONCAT).adapter
    assert set(scaled.modules[0].factors) == {"up", "down", "mid"}
    assert_is_the_sum(scaled, [Input(adapter(core), -0.5)], ROUNDING["F32"])


def test_a_tucker_core_where_the_layout_has_no_place_for_it() -> None:
    inputs = [Input(adapter(tucker(), lora(attention())), 0.5)]
    with pytest.raises(NotRepresentable):
        merge(inputs, CONCAT, to="peft")
    merged = merge(inputs, CONCAT, to="peft", approximate=True)
    spell(merged.adapter, "peft")
    assert_is_the_sum(merged.adapter, inputs, ROUNDING["F32"])
    assert merged.error == 0.0


def test_embeddings() -> None:
    place = next(t for t in architectures()["sd15"].naming("text_encoder", "hf-short").targets if "token" in t.path)
    table = Weight("text_encoder", "", "", (place,))
    rows, width = 700, place.shape[1]

    def made(rank: int, alpha: float) -> Adapter:
        factors = {"embedding_A": noise(rank, rows), "embedding_B": noise(width, rank)}
        return adapter(module(table, factors, alpha), layout="peft")

    inputs = [Input(made(3, 1.0), 0.5), Input(made(2, 5.0), -1.0)]
    merged = merge(inputs, CONCAT).adapter
    assert set(merged.modules[0].factors) == {"embedding_A", "embedding_B"}
    assert_is_the_sum(merged, inputs, ROUNDING["F32"])
    for method in ("ties", "linear"):
        same = [Input(made(3, 1.0), 0.5), Input(made(3, 1.0), 0.5)]
        assert set(merge(same, METHODS[method]).adapter.modules[0].factors) == {"embedding_A", "embedding_B"}


@pytest.mark.parametrize("method", ["concat", "linear", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lora_bias(method: str, dtype: torch.dtype) -> None:
    """The bias of up is scaled as the module is; the sum's bias is the sum of what is added."""

    def made(alpha: float | None) -> Module:
        plain = lora(attention("peft"), 4, alpha, dtype)
        return replace(plain, factors={**plain.factors, "bias": LazyTensor.from_torch(noise(320, dtype=dtype))})

    a, b, plain = made(2.0), made(-3.0), lora(attention("peft"), 4, 1.0, dtype)
    merged = summed([adapter(m, layout="peft") for m in (plain, a, b)], [1.0, 0.5, -0.25], method)
    (found,) = merged.adapter.modules
    assert {factor.dtype for factor in found.factors.values()} == {code_of(dtype)}
    added = [0.5 * a.scale * a.factors["bias"].load().double(), -0.25 * b.scale * b.factors["bias"].load().double()]
    assert relative(found.factors["bias"].load().double() * found.scale, sum(added[1:], added[0])) < 1e-3


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_block_weights_inside_a_fused_module() -> None:
    qkv = weight("flux", "kohya", "double_blocks.3.img_attn.qkv")
    model = architectures()["flux"]
    path = "transformer.transformer_blocks.3.attn"
    entries = (Entry(f"{path}.to_q", 0.0), Entry(f"{path}.to_k", -2.0))
    uneven = BlockWeights("", model, entries, 1.0)
    a, b = (adapter(lora(qkv, 3, 1.0, torch.float16), architecture="flux") for _ in range(2))
    inputs = [Input(a, 0.5, uneven), Input(b, 2.0)]
    for to in LAYOUTS:
        assert_is_the_sum(merge(inputs, CONCAT, to=to).adapter, inputs, ROUNDING["F16"])
    alone = merge(inputs[:1], CONCAT)
    assert_is_the_sum(alone.adapter, inputs[:1], ROUNDING["F16"])
    assert alone.cosines == {"transformer": [[pytest.approx(1.0)]]}


def test_silent_modules_are_named() -> None:
    second = weight("sd15", "kohya", ATTENTION.replace("to_q", "to_k"))
    a, b = adapter(lora(attention()), lora(second)), adapter(lora(second))
    off = BlockWeights("", a.architecture, (Entry(f"unet.{ATTENTION}", 0.0),), 1.0)
    merged = merge([Input(a, 1.0, off), Input(b, 0.0)], CONCAT)
    assert merged.silent == (f"unet.{ATTENTION}",)
    assert [row.ranks for row in merged.modules] == [(4, None)]
    shut = replace(off, entries=(), rest=0.0)
    with pytest.raises(UsageError, match="nothing is left"):
        merge([Input(a, 1.0, shut)], CONCAT)


# -- rules ------------------------------------------------------------------------------------------------------------


RULES = [("rank", "3"), ("energy", "0.9"), ("error", "0.3"), ("ratio", "3"), ("cumulative", "0.8"), ("knee", "")]


@pytest.mark.parametrize(("kind", "value"), RULES)
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_rule_truncates_the_exact_sum_optimally(kind: str, value: str, dtype: str) -> None:
    adapters = [one(6, 2.0, TYPES[dtype]), one(4, 8.0, TYPES[dtype]), one(6, -1.0, TYPES[dtype])]
    strengths = [1.0, 0.5, -0.5]
    merged = summed(adapters, strengths, rule=parse_rule(kind, value))
    meant = exact_sum(adapters, strengths)
    values = torch.linalg.svdvals(meant)
    (row,) = merged.modules
    best = float(values[row.rank_after :].norm() / values.norm())
    assert best > 0 and row.rank_after < 16
    assert row.error == pytest.approx(best, rel=1e-5)
    assert merged.error == pytest.approx(best, rel=1e-5) and merged.planned == (pytest.approx(best, rel=1e-5),)
    assert row.norm == pytest.approx(float(values.norm()), rel=1e-5)
    assert relative(delta(merged), meant) == pytest.approx(best, rel=1e-2 if dtype == "F16" else 1e-5)


def test_a_size_after_the_merge() -> None:
    a, b = (adapter(*(lora(w, 6) for w in weights("sd15", "kohya")[10:14])) for _ in range(2))

    def written(modules: Sequence[Module]) -> int:
        return sum(m.parameters for m in modules) * 4

    whole = merge([Input(a), Input(b)], CONCAT)
    target = written(whole.adapter.modules) // 2
    merged = merge([Input(a), Input(b)], CONCAT, rule=parse_rule("size", f"{target}B"), written=written)
    assert target * 0.9 <= written(merged.adapter.modules) <= target
    for row, made, rows in zip(merged.modules, merged.adapter.modules, whole.adapter.modules, strict=True):
        left, right = factors_of(rows)
        values = torch.linalg.svdvals(left @ right)
        assert row.error == pytest.approx(float(values[made.rank :].norm() / values.norm()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method", ["concat", "ties"])
def test_limits(method: str) -> None:
    """Bounds of ranks hold for dense results as for sums; a convolution's own rank is above the rule's."""
    pair = [adapter(lora(attention(), 6), lora(conv(), 6)) for _ in range(2)]

    def ranks(kind: str, value: str, limits: Limits) -> list[int]:
        merged = summed(pair, [1.0, 0.5], method, rule=parse_rule(kind, value), limits=limits)
        return [row.rank_after for row in merged.modules]

    assert ranks("rank", "2", Limits(conv_rank=5)) == [2, 5]
    assert ranks("rank", "2", Limits(min_rank=4)) == [4, 4]
    assert ranks("rank", "8", Limits(max_rank=3)) == [3, 3]
    assert ranks("rank", "8", Limits(max_rank=3, conv_rank=5)) == [3, 5]
    assert ranks("energy", "0.999", Limits(max_rank=3)) == [3, 3]


# -- LoKr and DoRA ----------------------------------------------------------------------------------------------------


def lokr(dtype: torch.dtype = torch.float32) -> Module:
    factors = {"w1": noise(4, 8, dtype=dtype), "w2_a": noise(80, 5, dtype=dtype), "w2_b": noise(5, 40, dtype=dtype)}
    return module(attention(), factors, 3.0, "lokr")


def test_a_lokr_alone_keeps_its_family() -> None:
    alone = lokr()
    assert merge([Input(adapter(alone))], CONCAT).adapter.modules[0] is alone
    inputs = [Input(adapter(alone), -0.5), Input(adapter(lora(conv())))]
    merged = merge(inputs, CONCAT)
    assert [m.family.id for m in merged.adapter.modules] == ["lokr", "lora"]
    assert_is_the_sum(merged.adapter, inputs, ROUNDING["F32"])
    assert merged.modules[0].norm == pytest.approx(0.5 * float(alone.delta().norm()), rel=1e-5)


def test_lokr_and_lora() -> None:
    adapters, strengths = [adapter(lokr()), one(4)], [0.8, -0.5]
    with pytest.raises(NotExact, match="LoKr") as caught:
        summed(adapters, strengths)
    assert ATTENTION in str(caught.value) and "--approximate" in str(caught.value)
    with pytest.raises(UsageError, match="how far"):
        summed(adapters, strengths, approximate=True)
    meant = exact_sum(adapters, strengths)
    x, values, y = torch.linalg.svd(meant)
    for rank in (6, 30):
        merged = summed(adapters, strengths, approximate=True, rule=parse_rule("rank", str(rank)))
        best = float(values[rank:].norm() / values.norm())
        assert merged.modules[0].approximated == ("LoKr",)
        assert merged.modules[0].rank_after == min(rank, 4 * 5 + 4)  # kron's ranks multiply
        assert merged.error == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert relative(delta(merged), (x[:, :rank] * values[:rank]) @ y[:rank]) < 1e-5
        assert merged.adapter.modules[0].alpha is not None


def test_lokr_with_uneven_block_weights() -> None:
    qkv = weight("flux", "kohya", "double_blocks.0.img_attn.qkv")
    narrow = module(qkv, {"w1": noise(6, 2), "w2_a": noise(32, 3), "w2_b": noise(3, 32)}, 3.0, "lokr")
    one = adapter(narrow, architecture="flux")
    uneven = BlockWeights("", one.architecture, (Entry("transformer.transformer_blocks.0.attn.to_q", 0.5),), 1.0)
    inputs = [Input(one, 1.0, uneven)]
    with pytest.raises(NotExact, match="LoKr"):
        merge(inputs, CONCAT)
    merged = merge(inputs, CONCAT, approximate=True, rule=parse_rule("rank", "64"))
    assert_is_the_sum(merged.adapter, inputs, 1e-5)
    (terms,) = merged.expected
    assert_is_the_sum(adapter(terms[0][0], architecture="flux"), inputs, 1e-5)


def test_a_lokr_where_the_layout_has_no_place_for_it() -> None:
    alone = adapter(lokr())
    with pytest.raises(NotRepresentable, match="LoKr"):
        merge([Input(alone)], CONCAT, to="diffusers")
    merged = merge([Input(alone)], CONCAT, to="diffusers", approximate=True, rule=parse_rule("rank", "20"))
    spell(merged.adapter, "diffusers")
    values = torch.linalg.svdvals(exact_sum([alone], [1.0]))
    assert merged.modules[0].approximated == ("LoKr",)
    assert merged.error == pytest.approx(float(values[20:].norm() / values.norm()), rel=1e-4, abs=1e-6)


def dora(per_row: bool = True, rank: int = 4, alpha: float = 2.0) -> Module:
    shape = (320, 1) if per_row else (1, 320)
    magnitude = torch.rand(shape, generator=NOISE) + 0.5
    return replace(lora(attention(), rank, alpha), magnitude=LazyTensor.from_torch(magnitude))


def base(values: Tensor) -> BaseWeights:
    model = architectures()["sd15"]
    checkpoint = next(c for c in model.checkpoints if c.id == "diffusers")
    voice = checkpoint.voices["unet"]
    tensors = {f"{voice.prefix}{ATTENTION}.weight": LazyTensor.from_torch(values)}
    return BaseWeights("base.safetensors", model, {"unet": tensors}, {"unet": voice})


def of_dora(one: Module, weight: Tensor) -> Tensor:
    """m (W + delta) / ||W + delta|| - W, by hand."""
    left, right = factors_of(replace(one, magnitude=None))
    whole = weight.double() + left @ right
    assert one.magnitude is not None
    dim = 1 if one.magnitude.shape[0] > 1 else 0
    return one.magnitude.load().double() * whole / (whole * whole).sum(dim, keepdim=True).sqrt() - weight.double()


@pytest.mark.parametrize("per_row", [True, False])
def test_a_dora_alone_stays_as_it_is(per_row: bool) -> None:
    """Without the base weights: nobody has to know what it does to keep it."""
    alone, other = dora(per_row), lora(conv())
    merged = merge([Input(adapter(alone)), Input(adapter(other), 0.5)], CONCAT)
    assert merged.adapter.modules[0] is alone
    assert merged.error == 0.0 and math.isfinite(merged.modules[0].norm)
    assert math.isnan(merged.cosines["unet"][0][1]) and merged.cosines["unet"][1][1] == pytest.approx(1.0)
    cut = merge([Input(adapter(alone))], CONCAT, rule=parse_rule("rank", "2")).adapter.modules[0]
    assert cut.rank == 2 and cut.magnitude is alone.magnitude
    halved = merge([Input(adapter(alone))], CONCAT, dtype="BF16").adapter.modules[0]
    assert halved.magnitude is not None and halved.dtype == "BF16"


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("method", ["concat", "magnitude_prune"])
def test_dora_with_the_base(per_row: bool, method: str) -> None:
    weight = noise(320, 320)
    alone, plain = dora(per_row), lora(attention(), 3)
    adapters, strengths = [adapter(alone), adapter(plain)], [0.7, -1.2]
    with pytest.raises(NotExact, match="DoRA") as caught:
        summed(adapters, strengths, method)
    assert "--base" in str(caught.value) and ATTENTION in str(caught.value)
    with pytest.raises(NotExact, match="base weights"):
        summed(adapters, strengths, method, approximate=True, rule=parse_rule("rank", "9"))
    meant = 0.7 * of_dora(alone, weight) - 1.2 * exact_sum(adapters[1:], [1.0])
    for rank in (9, 320):
        merged = summed(
            adapters, strengths, method, approximate=True, rule=parse_rule("rank", str(rank)), base=base(weight)
        )
        values = torch.linalg.svdvals(meant)
        best = float(values[rank:].norm() / values.norm())
        (made,) = merged.adapter.modules
        assert made.magnitude is None and merged.modules[0].approximated == ("DoRA",)
        assert relative(delta(merged), meant) == pytest.approx(best, rel=1e-4, abs=1e-4)
        assert merged.error == pytest.approx(best, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("strength", [-1.0, 0.5])
def test_a_dora_is_never_scaled_without_the_base(strength: float) -> None:
    with pytest.raises(NotExact, match="DoRA"):
        summed([adapter(dora())], [strength])
    weight = noise(320, 320)
    merged = summed(
        [adapter(dora_ := dora())], [strength], approximate=True, rule=parse_rule("rank", "320"), base=base(weight)
    )
    assert relative(delta(merged), strength * of_dora(dora_, weight)) < 1e-4
    cosine = merged.cosines["unet"][0][0]
    assert cosine == pytest.approx(1.0)


# -- methods that need the dense update -------------------------------------------------------------------------------


class Dense:
    """An update as a method may see it: float64, from the stored factors."""

    def __init__(self, index: int, one: Module) -> None:
        self.index, self.name, self.shape = index, one.title, (one.shape[0], one.delta_width)
        self._pair, self._scale = factors_of(one), one.scale

    def pair(self) -> Pair:
        """The (positive) scale in both, as the methods are promised."""
        left, right = self._pair
        return left / math.sqrt(self._scale), right * math.sqrt(self._scale)

    def dense(self) -> Tensor:
        return self._pair[0] @ self._pair[1]


DENSE = {
    "ties": {"density": 0.4},
    "magnitude_prune": {"density": 0.3},
    "dare_linear": {"density": 0.5, "seed": 3},
    "dare_ties": {"density": 0.5, "sign": "frequency"},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.8},
    "breadcrumbs_ties": {"density": 0.8},
    "slerp": {"t": 0.3},
    "nuslerp": {"row_wise": True, "flatten": False},
    "karcher": {},
    "sce": {"select_topk": 0.5},
    "nearswap": {"t": 1e-3},
    "knots": {"density": 0.7},
    "linear": {},
}


def test_every_method_is_tried() -> None:
    assert {*DENSE, "concat"} == set(METHODS)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_the_best_approximation_of_what_a_method_says(name: str, dtype: str) -> None:
    strengths = [0.9, 0.6]
    adapters = [one(5, 2.0, TYPES[dtype]), one(5, 4.0, TYPES[dtype])]
    merged = summed(adapters, strengths, name, options=DENSE[name])
    method = METHODS[name]
    said = method.apply([Dense(i, a.modules[0]) for i, a in enumerate(adapters)], strengths, DENSE[name])
    meant = said if isinstance(said, Tensor) else said[0] @ said[1]
    (row,) = merged.modules
    assert merged.adapter.modules[0].dtype == dtype
    off = relative(delta(merged), meant)
    if name == "linear":
        assert row.rank_after == 5 and off < ROUNDING[dtype]
        exact = exact_sum(adapters, strengths)
        assert row.error == pytest.approx(relative(meant, exact), rel=1e-4)
        return
    if isinstance(said, tuple):
        # Single entries next to the pruning threshold may fall on its other side in float32.
        assert off < 3e-3 and row.error == 0.0
        return
    values = torch.linalg.svdvals(meant)
    best = float(values[5:].norm() / values.norm())
    assert row.rank_after == 5
    assert row.error == pytest.approx(best, rel=1e-3) and off == pytest.approx(best, rel=1e-3)
    assert row.norm == pytest.approx(float(meant.norm()), rel=1e-4)


def test_a_rule_for_a_dense_method() -> None:
    adapters, strengths = [one(5), one(3)], [1.0, -0.8]
    meant = METHODS["ties"].apply([Dense(i, a.modules[0]) for i, a in enumerate(adapters)], strengths, {})
    values = torch.linalg.svdvals(meant)
    for kind, value in (("rank", "12"), ("energy", "0.7"), ("error", "0.6")):
        merged = summed(adapters, strengths, "ties", rule=parse_rule(kind, value))
        (row,) = merged.modules
        best = float(values[row.rank_after :].norm() / values.norm())
        assert row.error == pytest.approx(best, rel=1e-3)
        assert relative(delta(merged), meant) == pytest.approx(best, rel=1e-3)
        if kind == "energy":  # the smallest rank that keeps it
            assert 1 - best**2 >= 0.7 > 1 - float(values[row.rank_after - 1 :].norm() / values.norm()) ** 2
        if kind == "error":
            assert best <= 0.6 < float(values[row.rank_after - 1 :].norm() / values.norm())


def test_an_input_of_strength_0_still_votes() -> None:
    """As PEFT and docs/merging.md have it; of a module that no other input has, nothing is left."""
    a, b = one(), adapter(lora(attention(), 3), lora(conv()))
    full = parse_rule("rank", "320")
    merged = summed([a, b], [1.0, 0.0], "ties", rule=full)
    meant = METHODS["ties"].apply([Dense(0, a.modules[0]), Dense(1, b.modules[0])], [1.0, 0.0], {})
    assert relative(delta(merged), meant) < 1e-3
    assert len(merged.silent) == 1 and "conv1" in merged.silent[0]
    summed([a, b], [1.0, 0.0], "linear")  # takes one rank, and b takes no part


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_give_the_same_bits(name: str) -> None:
    adapters = [
        adapter(*(lora(weight("sd15", "kohya", ATTENTION.replace("to_q", part)), 2) for part in ("to_q", "to_k")))
        for _ in range(2)
    ]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            made = summed(adapters, [1.0, 0.5], name, options={"density": 0.5, "seed": 7}).adapter
            found.append([bytes(factor.read()) for m in made.modules for factor in m.factors.values()])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][2]


# -- what is told -----------------------------------------------------------------------------------------------------


def test_cosines() -> None:
    key = weight("sd15", "kohya", ATTENTION.replace("to_q", "to_k"))
    text = weight("sd15", "kohya", "text_model.encoder.layers.0.self_attn.q_proj")
    a, b = adapter(lora(attention()), lora(key)), adapter(lora(attention(), 3, -1.0), lora(text))
    opposite = adapter(*(replace(m, alpha=-5.0) for m in a.modules))
    off = BlockWeights("", a.architecture, (Entry(f"unet.{ATTENTION}", 3.0),), 1.0)
    merged = merge([Input(a, 1.0, off), Input(b, -2.0), Input(opposite, 0.1, off)], CONCAT)
    terms = [rows_of(a, 1.0, off), rows_of(b), rows_of(opposite, 1.0, off)]
    for component in ("unet", "text_encoder"):
        keys = sorted({key for rows in terms for key in rows if key[0] == component})
        flat = []
        for rows in terms:
            blank = [torch.zeros(next(r[k][0] @ r[k][1] for r in terms if k in r).shape) for k in keys]
            own = [rows[k][0] @ rows[k][1] if k in rows else blank[n] for n, k in enumerate(keys)]
            flat.append(torch.cat([dense.double().flatten() for dense in own]))
        for i, left in enumerate(flat):
            for j, right in enumerate(flat):
                found, size = merged.cosines[component][i][j], float(left.norm() * right.norm())
                assert found == pytest.approx(float(left @ right) / size, abs=1e-5) if size else math.isnan(found)
    assert merged.cosines["unet"][0][2] == pytest.approx(-1.0)


def test_cosines_of_large_ranks_are_estimated_well() -> None:
    shared = noise(320, 90), noise(90, 320)

    def mixed(part: float) -> Adapter:
        up = shared[0] + part * noise(320, 90)
        return adapter(module(attention(), {"up": up, "down": shared[1]}, 90.0))

    a, b = mixed(0.0), mixed(0.7)
    merged = summed([a, b], [1.0, 1.0], rule=parse_rule("rank", "8"))
    dense = [exact_sum([m], [1.0]).flatten() for m in (a, b)]
    assert merged.cosines["unet"][0][1] == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)), abs=0.05)
    assert summed([a, a], [1.0, -1.0]).cosines["unet"][0][1] == pytest.approx(1.0)


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (1.0, -0.5)])
def test_conflicts(strengths: tuple[float, float]) -> None:
    adapters = [one(2), one(3)]
    (row,) = summed(adapters, strengths, "ties").modules
    first, second = (w * exact_sum([a], [1.0]) for a, w in zip(adapters, strengths, strict=True))
    assert (row.conflicts, row.shared) == (int((first * second < 0).sum()), int((first * second != 0).sum()))
    assert sign_conflicts([first, second], [1.0, 1.0]) == (row.conflicts, row.shared)
    assert summed(adapters, strengths).modules[0].conflicts is None


def test_ticks() -> None:
    told: list[tuple[int, int]] = []
    pair = [adapter(*(lora(w, 2) for w in weights("sd15", "kohya")[10:15])) for _ in range(2)]
    merge([Input(a) for a in pair], CONCAT, tick=lambda done, total: told.append((done, total)))
    assert told == [(n, 5) for n in range(1, 6)]


def test_nothing_is_held_that_can_be_read_again() -> None:
    """A sum of independent factors is made when it is written: input by input, module by module."""
    loads: list[str] = []
    inputs = [Input(adapter(counted(name, lora(attention(), 2), loads))) for name in "ab"]
    made = merge(inputs, CONCAT).adapter.modules[0]
    assert sorted(loads) == ["a down", "a up", "b down", "b up"]  # once, to see that they are independent
    loads.clear()
    made.factors["up"].read(), made.factors["down"].read()
    assert sorted(loads) == ["a down", "a up", "b down", "b up"]  # once for both halves
    assert_is_the_sum(merge(inputs, CONCAT).adapter, inputs, 1e-6)


def counted(name: str, one: Module, loads: list[str]) -> Module:
    def lazy(role: str, factor: LazyTensor) -> LazyTensor:
        def make() -> Tensor:
            loads.append(f"{name} {role}")
            return factor.load()

        return LazyTensor.computed(factor.shape, factor.dtype, make)

    return replace(one, factors={role: lazy(role, factor) for role, factor in one.factors.items()})


@pytest.mark.parametrize("rule", [None, "2"])
def test_dependent_factors_are_made_again_when_they_are_written(rule: str | None) -> None:
    """Of two equal adapters small matrices alone are kept, and each is read once to write both halves."""
    loads: list[str] = []
    same = lora(attention(), 4)
    inputs = [Input(adapter(counted(name, same, loads))) for name in "ab"]
    merged = merge(inputs, CONCAT, rule=parse_rule("rank", rule) if rule else None)
    (made,) = merged.adapter.modules
    assert sorted(loads) == ["a down", "a up", "b down", "b up"] and made.rank == int(rule or 4)
    loads.clear()
    up, down = made.factors["up"].load(), made.factors["down"].load()
    # The first time, what was read to decide is still there.
    assert set(loads) <= {"a down", "a up", "b down", "b up"} and len(loads) <= 4
    again = made.factors["up"].load(), made.factors["down"].load()
    assert torch.equal(up, again[0]) and torch.equal(down, again[1])


# -- cancelling -------------------------------------------------------------------------------------------------------


def rescaled(one: Adapter, by: float) -> Adapter:
    """The same update with factors of other sizes."""
    (old,) = one.modules
    up, down = old.factors["up"].load(), old.factors["down"].load()
    return adapter(module(attention(), {"up": up * by, "down": down / by}, old.alpha))


@pytest.mark.parametrize("method", ["concat", "linear"])
@pytest.mark.parametrize("by", [1.0, 3.0])
@pytest.mark.parametrize("rule", [None, "3"])
def test_a_sum_that_cancels_nearly(method: str, by: float, rule: str | None) -> None:
    """Norm and error of what is left are right, far below the root of the rounding of the terms."""
    a, small = one(dtype=torch.float64), one(dtype=torch.float64)
    (old,) = rescaled(a, by).modules
    up = old.factors["up"].load() + 1e-6 * small.modules[0].factors["up"].load()
    b = adapter(replace(old, factors={**old.factors, "up": LazyTensor.from_torch(up)}))
    merged = summed([a, b], [1.0, -1.0], method, rule=parse_rule("rank", rule) if rule else None)
    (row,), meant = merged.modules, exact_sum([a, b], [1.0, -1.0])
    assert row.norm == pytest.approx(float(meant.norm()), rel=1e-6)
    if method == "concat" or rule is None:
        assert row.error == pytest.approx(relative(delta(merged), meant), rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("method", ["concat", "linear"])
@pytest.mark.parametrize("rank", [4, 90])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_sum_that_cancels(method: str, rank: int, dtype: str) -> None:
    """A minus A, the second with larger factors and a smaller alpha."""
    a = one(rank, float(rank), TYPES[dtype])
    (old,) = a.modules
    up = LazyTensor.from_torch(old.factors["up"].load() * 4)
    b = adapter(replace(old, factors={**old.factors, "up": up}, alpha=rank / 4))
    merged = summed([a, b], [0.7, -0.7], method)
    assert merged.modules[0].norm == 0.0 and merged.modules[0].error == 0.0 and merged.error == 0.0
    if method == "concat":
        assert merged.modules[0].rank_after == 1 and not delta(merged).any()
        assert merged.images[0] is not None and not merged.images[0].any()


def test_loras_that_cancel_beside_a_dora() -> None:
    weight = noise(320, 320)
    merged = summed([adapter(dora_ := dora()), adapter(dora_)], [1.0, -1.0], approximate=True, base=base(weight),
                    rule=parse_rule("energy", "0.99"))  # fmt: skip
    assert merged.modules[0].norm == 0.0 and merged.error == 0.0 and not delta(merged).any()


# -- what a dtype holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("strength", [1e6, -3e5, 7e3])
@pytest.mark.parametrize("rule", [None, "7"])
def test_large_strengths_are_spread(inputs: int, strength: float, rule: str | None) -> None:
    adapters = [one(dtype=torch.float16), one(dtype=torch.float16)][:inputs]
    strengths = [strength, 1.0][:inputs]
    merged = summed(adapters, strengths, rule=parse_rule("rank", rule) if rule else None)
    (made,) = merged.adapter.modules
    for factor in made.factors.values():
        assert factor.dtype == "F16" and bool(factor.load().isfinite().all())
    if rule is None:
        assert relative(delta(merged), exact_sum(adapters, strengths)) < ROUNDING["F16"]


@pytest.mark.parametrize("strength", [1.0, 2.0, 100.0])
def test_bits_stay_where_nothing_is_at_risk(strength: float) -> None:
    a, b = one(dtype=torch.float16), one(dtype=torch.float16)
    (made,) = summed([a, b], [1.0, strength]).adapter.modules
    (first,), (second,) = a.modules, b.modules
    assert torch.equal(made.factors["up"].load()[:, :4], first.factors["up"].load())
    assert torch.equal(made.factors["up"].load()[:, 4:], second.factors["up"].load())
    (alone,) = summed([a], [strength]).adapter.modules
    assert torch.equal(alone.factors["down"].load(), first.factors["down"].load())


@pytest.mark.parametrize("kind", ["one", "two", "dense", "bias", "lokr", "block"])
def test_what_no_dtype_of_the_file_holds(kind: str) -> None:
    """Refused before anything is written, with the way out; with that, it works."""
    plain = lora(attention("peft"), dtype=torch.float16)
    if kind == "bias":
        bias = LazyTensor.from_torch(noise(320, dtype=torch.float16))
        plain = replace(plain, factors={**plain.factors, "bias": bias})
    first = lokr(torch.float16) if kind == "lokr" else plain
    layout = "peft" if kind == "bias" else "kohya"
    strength = 1e7 if kind == "bias" else 1e14
    blocks = BlockWeights("", architectures()["sd15"], (), strength) if kind == "block" else None
    inputs = [Input(adapter(first, layout=layout), 1.0 if blocks else strength, blocks)]
    inputs += [Input(one(dtype=torch.float16))] if kind in ("two", "dense") else []
    method = METHODS["ties" if kind == "dense" else "concat"]
    with pytest.raises(TooLarge, match="F16") as caught:
        merge(inputs, method)
    assert ATTENTION in str(caught.value) and "--dtype" in str(caught.value)
    merged = merge(inputs, method, dtype="F32")
    assert all(bool(f.load().isfinite().all()) for f in merged.adapter.modules[0].factors.values())
    if kind != "dense":
        assert_is_the_sum(merged.adapter, inputs, 1e-3)


def test_what_float32_does_not_hold() -> None:
    for method in ("concat", "ties"):
        with pytest.raises(TooLarge):
            summed([one(), one(3)], [1e300, 1.0], method)


# -- LoKr that has to be cut ------------------------------------------------------------------------------------------


def test_a_lokr_that_has_to_be_cut() -> None:
    """It needs a rule, and is reported like any other module that a pair replaces."""
    qkv = weight("flux", "kohya", "double_blocks.0.img_attn.qkv")
    across = module(qkv, {"w1": noise(2, 4), "w2": noise(72, 12)}, None, "lokr")
    inputs = [Input(adapter(across, architecture="flux"), 0.5)]
    with pytest.raises(UsageError, match="how far"):
        merge(inputs, CONCAT, to="diffusers", approximate=True)
    merged = merge(inputs, CONCAT, to="diffusers", approximate=True, rule=parse_rule("rank", "3"))
    spell(merged.adapter, "diffusers")
    parts = (0.5 * across.delta().double()).split(48)
    for row, made, meant in zip(merged.modules, merged.adapter.modules, parts, strict=True):
        values = torch.linalg.svdvals(meant)
        best = float(values[3:].norm() / values.norm())
        assert row.approximated == ("LoKr",) and row.rank_after == 3 and row.ranks == (12,)
        assert row.error == pytest.approx(best, rel=1e-4)
        assert row.norm == pytest.approx(float(values.norm()), rel=1e-5)
        left, right = factors_of(made)
        assert relative(left @ right, meant) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("rule", [("energy", "0.9"), ("rank", "5"), ("error", "0.3")])
def test_one_decomposition_of_what_is_no_product(monkeypatch: pytest.MonkeyPatch, rule: tuple[str, str]) -> None:
    """The dense sum is decomposed once, and no more of it is held than the rule leaves."""
    calls = []

    def counting(matrix: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(matrix.shape)
        return low_rank(matrix, limit)

    for place in ("merge", "terms"):
        monkeypatch.setattr(f"loratool.ops.{place}.low_rank", counting)
    monkeypatch.setattr("loratool.ops.decompose.spectrum", None)
    inputs = [Input(adapter(dora())), Input(adapter(lokr()), 0.3)]
    merged = merge(inputs, CONCAT, approximate=True, rule=parse_rule(*rule), base=base(noise(320, 320)))
    for factor in merged.adapter.modules[0].factors.values():
        factor.read()
    assert calls == [(320, 320)]
    ((expected, _),) = merged.expected[0]
    if rule[0] != "error":
        assert expected.rank == merged.adapter.modules[0].rank


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("method", ["concat", "ties", "linear"])
def test_values_that_are_no_numbers(value: float, role: str, method: str) -> None:
    bad = lora(attention())
    values = bad.factors[role].load().clone()
    values[1, 2] = value
    bad = replace(bad, factors={**bad.factors, role: LazyTensor.from_torch(values)})
    for adapters in ([one(), adapter(bad)], [adapter(bad)]):
        with pytest.raises(FormatError, match="NaN or infinite") as caught:
            summed(adapters, [1.0] * len(adapters), method)
        assert ATTENTION in str(caught.value)


def test_a_bad_magnitude() -> None:
    bad = replace(dora(), magnitude=LazyTensor.from_torch(torch.full((320, 1), math.nan)))
    with pytest.raises(FormatError, match="NaN or infinite"):
        summed([adapter(bad)], [1.0])


def test_strengths_and_numbers_of_inputs() -> None:
    a, b = one(), one()
    for strengths in ([0.0, 0.0], [0.0, -0.0]):
        with pytest.raises(UsageError, match="nothing is left"):
            summed([a, b], strengths)
        with pytest.raises(UsageError, match="nothing is left"):
            summed([a, b], strengths, "ties")
    for strength in (math.nan, math.inf):
        with pytest.raises(UsageError, match="finite number"):
            summed([a, b], [1.0, strength])
    with pytest.raises(UsageError, match="slerp takes 1 to 2 inputs, found 3"):
        summed([a, b, a], [1.0] * 3, "slerp")
    with pytest.raises(UsageError, match="found 0"):
        summed([], [])


@pytest.mark.parametrize(
    "options", [{"density": "x"}, {"density": math.nan}, {"sign": 1}, {"normalize": 1}, {"depth": 1}, {"density": True}]
)
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        summed([one(), one()], [1.0, 1.0], "ties", options=options)


def test_other_models_and_sizes() -> None:
    flux = adapter(lora(weight("flux", "kohya", "double_blocks.0.img_attn.proj")), architecture="flux", path="b")
    with pytest.raises(FormatError, match=r"FLUX.* a\.safetensors for"):
        summed([one(), flux], [1.0, 1.0])
    wide = adapter(module(attention(), {"up": noise(320, 2), "down": noise(2, 768)}, 1.0), path="wide.safetensors")
    with pytest.raises(FormatError) as caught:
        summed([one(), wide], [1.0, 1.0])
    assert "[320, 768]" in str(caught.value) and "[320, 320]" in str(caught.value)
    assert (caught.value.file, caught.value.key) == ("wide.safetensors", f"unet.{ATTENTION}")
    tall = adapter(module(attention(), {"up": noise(640, 2), "down": noise(2, 320)}, 1.0))
    with pytest.raises(FormatError, match="640"):
        summed([one(), tall], [1.0, 0.0])


def test_linear_takes_one_rank() -> None:
    with pytest.raises(UsageError, match="ranks 4, 3"):
        summed([one(4), one(3)], [1.0, 1.0], "linear")
