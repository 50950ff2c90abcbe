"""convert: there and back for every pair of layouts, metadata, extras, and the proof of what was written."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import NotExact, NotRepresentable, UnknownModel, UsageError
from loratool.core.registry import layouts
from loratool.core.tensor import Held, LazyTensor
from loratool.files import bundle as bundles
from loratool.files.bundle import read_bundle
from loratool.ops import origin
from loratool.ops.compare import ROUNDING, compare
from loratool.ops.convert import Converted, convert
from loratool.ops.convert_file import Report, convert_file
from loratool.ops.open import open_adapter, understand
from loratool.ops.save import NotTheSame
from loratool.ops.spell import HEADER_ROOM
from tests.builders import (
    ARCHITECTURES,
    LAYOUTS,
    Part,
    Style,
    Weight,
    architecture_of,
    build,
    contents,
    pair,
    random_parts,
    spelled,
    typical_parts,
    weight,
    write_file,
)
from tests.contracts import assert_same_tensors

PAIRS = list(permutations(LAYOUTS, 2))

each_pair = pytest.mark.parametrize(("source", "to"), PAIRS, ids=[f"{a}-to-{b}" for a, b in PAIRS])
each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)


def read(bundle: Bundle, layout: str, architecture: str) -> Adapter:
    return layouts()[layout].read(bundle, architecture_of(architecture))


def again(converted: Converted) -> Adapter:
    """What a reader of the converted file sees: every tensor computed once, as on the disk."""
    held = {key: LazyTensor(t.shape, t.dtype, Held(bytes(t.read()))) for key, t in converted.bundle.tensors.items()}
    return converted.layout.read(replace(converted.bundle, tensors=held), converted.adapter.architecture)


def assert_same_file(before: Bundle, after: Bundle) -> None:
    """Keys, dtypes, shapes, bytes, header and side files."""
    assert_same_tensors(before, after)
    assert dict(after.metadata) == dict(before.metadata)
    assert dict(after.side_files) == dict(before.side_files)


def worst(left: Adapter, right: Adapter) -> float:
    return max(difference.error for difference in compare(left.modules, right.modules))


# -- there and back -------------------------------------------------------------------------------------------------


@each_model
@each_pair
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_there_and_back_is_the_same_file(source: str, to: str, architecture: str, dtype: str) -> None:
    style = Style(metadata={"author": "a ☃", "ss_network_dim": "4", "ss_network_alpha": "2.0"})
    original = build(typical_parts(architecture, source, alpha=2.0, dtype=dtype), source, style)
    adapter = understand(original).adapter
    there = convert(adapter, to)
    detected = understand(there.bundle).adapter
    assert (detected.layout, detected.architecture.id) == (to, architecture)
    opened = again(there)
    assert worst(adapter, opened) == 0.0
    back = convert(opened, source)
    assert back.returned
    assert_same_file(original, back.bundle)


@each_model
def test_the_same_layout_is_the_same_modules(architecture: str) -> None:
    for layout in LAYOUTS:
        original = build(typical_parts(architecture, layout, alpha=2.0), layout)
        adapter = read(original, layout, architecture)
        assert_same_tensors(original, convert(adapter, layout).bundle)


@each_model
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chain_of_layouts_keeps_the_update(layout: str, architecture: str) -> None:
    adapter = read(build(typical_parts(architecture, layout, alpha=2.0), layout), layout, architecture)
    there = adapter
    for to in [*(other for other in LAYOUTS if other != layout), layout]:
        there = again(convert(there, to))
    assert worst(adapter, there) == 0.0
    assert [entry["to"] for entry in json.loads(there.metadata["loratool.history"])][-1] == layout


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, str, Bundle]:
    """(architecture, layout, target layout, file): random modules, ranks, alphas and habits of the writer."""
    architecture = draw(st.sampled_from(ARCHITECTURES))
    source, to = draw(st.sampled_from(PAIRS))
    dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    ranks = draw(st.sampled_from([(4,), (1, 2), (1, 2, 3, 5, 8)]))
    # Parts of one fused weight that have different scales are brought to one; what that means is tested apart.
    scale = draw(st.sampled_from([1.0, 0.5, 2.0, 0.7, 1 / 3]))
    parts = random_parts(rng, architecture, source, draw(st.integers(1, 8)), ranks, (None,), dtype)
    fused = source in ("diffusers", "peft") and to in ("kohya", "comfyui") and architecture == "flux"
    if fused or draw(st.booleans()):
        parts = [replace(part, alpha=float(part.rank) * scale) for part in parts]
    else:
        parts = [replace(part, alpha=rng.choice((0.25, 1.0, 3.0, 4.0, 6.5))) for part in parts]
    if source == "kohya" and draw(st.booleans()):
        parts = [replace(part, alpha=rng.choice((part.alpha, None))) for part in parts]
    if draw(st.booleans()):
        parts = [replace(part, zero_up=rng.random() < 0.3) for part in parts]
    exact = all(part.alpha is None or part.alpha == int(part.alpha) for part in parts)
    style = Style(
        alpha_dtype=draw(st.sampled_from(["F32", "F64", *([None, "I64"] if exact else [])])),
        alpha_shape=draw(st.sampled_from([(), (1,)])),
        adapter_name=draw(st.sampled_from([None, "default"])) if source == "peft" else None,
        metadata=draw(
            st.dictionaries(
                st.sampled_from(["ss_network_dim", "ss_network_alpha", "sshs_model_hash", "title", "é", "loratool.x"]),
                st.text(max_size=12),
                max_size=4,
            )
        ),
    )
    return architecture, source, to, build(parts, source, style, seed=rng.randrange(100))


@settings(deadline=None, max_examples=100)
@given(case=files())
def test_any_file_comes_back_bit_for_bit(case: tuple[str, str, str, Bundle]) -> None:
    architecture, source, to, original = case
    adapter = read(original, source, architecture)
    there = again(convert(adapter, to))
    assert worst(adapter, there) < 1e-14  # alpha is a number of its own: scale * rank / rank may round
    assert not there.extras
    back = convert(there, source)
    assert back.returned
    assert_same_file(original, back.bundle)


@settings(deadline=None, max_examples=40)
@given(case=files(), order=st.randoms(use_true_random=False))
def test_any_file_comes_back_whatever_the_order_of_its_keys(
    case: tuple[str, str, str, Bundle], order: random.Random
) -> None:
    """Between the two conversions the file is on the disk, where keys are sorted."""
    architecture, source, to, original = case
    there = convert(read(original, source, architecture), to).bundle
    keys = list(there.tensors)
    order.shuffle(keys)
    mixed = replace(there, tensors={key: there.tensors[key] for key in keys})
    assert_same_file(original, convert(read(mixed, to, architecture), source).bundle)


Q, K, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("source", ["diffusers", "peft"])
@pytest.mark.parametrize("alphas", [(4.0, 2.0, 8.0), (4.0, 4.0, 1.0), (3.0, 1.0, 0.7)])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_parts_of_one_fused_weight_with_other_alphas(
    source: str, to: str, alphas: tuple[float, ...], dtype: str
) -> None:
    parts = [Part(weight("flux", source, name), 4, alpha, dtype) for name, alpha in zip((Q, K, V), alphas, strict=True)]
    original = build(parts, source)
    adapter = read(original, source, "flux")
    there = again(convert(adapter, to))
    assert worst(adapter, there) <= ROUNDING[dtype]
    back = convert(there, source)
    assert worst(adapter, again(back)) <= ROUNDING[dtype]
    if alphas[0] != 3.0:  # powers of two round nothing
        assert worst(adapter, there) < 1e-14
        assert_same_file(original, back.bundle)


def test_only_q_and_v_become_rank_12_and_come_back() -> None:
    parts = [Part(weight("flux", "diffusers", Q), 4, 4.0), Part(weight("flux", "diffusers", V), 8, 8.0)]
    original = build(parts, "diffusers")
    converted = convert(read(original, "diffusers", "flux"), "kohya")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert converted.bundle.tensors[f"{stem}.lora_down.weight"].shape == (12, 3072)
    assert converted.bundle.tensors[f"{stem}.alpha"].item() == 12.0
    up = converted.bundle.tensors[f"{stem}.lora_up.weight"].load()
    assert not up[3072:6144].any()
    assert_same_file(original, convert(again(converted), "diffusers").bundle)
    foreign = replace(converted.bundle, metadata={})  # as another program would have written it
    split = convert(read(foreign, "kohya", "flux"), "diffusers")
    assert {m.targets[0].path: m.rank for m in again(split).modules} == {Q: 4, V: 8}
    assert split.vanished == (f"transformer.{K}",)


@each_pair
def test_untrained_modules_survive(source: str, to: str) -> None:
    parts = [replace(part, zero_up=True) for part in typical_parts("flux", source, alpha=4.0)]
    original = build(parts, source)
    there = again(convert(read(original, source, "flux"), to))
    assert {t for m in there.modules for t in m.targets} >= {t for part in parts for t in part.weight.targets}
    assert_same_file(original, convert(there, source).bundle)


def test_shift_and_scale_swap_on_the_way_to_diffusers() -> None:
    native = Part(weight("flux", "kohya", "final_layer.adaLN_modulation.1"), 2, 2.0)
    original = build([native], "kohya")
    there = convert(read(original, "kohya", "flux"), "diffusers")
    before = original.tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"].load()
    after = there.bundle.tensors["transformer.norm_out.linear.lora_B.weight"].load()
    assert torch.equal(after, torch.cat([before[3072:], before[:3072]]))
    assert_same_file(original, convert(again(there), "kohya").bundle)


# -- dense updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "source", "name"),
    [
        ("sd15", "kohya", "down_blocks.0.attentions.0.proj_in"),
        ("sd15", "kohya", "down_blocks.0.resnets.0.conv1"),
        ("sdxl", "kohya", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
        ("flux", "kohya", "final_layer.linear"),
        ("flux", "kohya", "img_in"),
    ],
)
def test_the_dense_update_is_the_very_same(architecture: str, source: str, name: str) -> None:
    adapter = read(build([Part(weight(architecture, source, name), 3, 2.0)], source), source, architecture)
    (before,) = adapter.modules
    for to in LAYOUTS:
        (after,) = again(convert(adapter, to)).modules
        assert torch.equal(before.delta(), after.delta().reshape(before.delta().shape)), to


def test_a_narrow_model_converts_with_its_own_heights() -> None:
    """A Flux of width 24: found by its names; fused weights are cut in the table's proportions."""
    tensors: dict[str, LazyTensor] = {}
    for name, height in (("double_blocks.0.img_attn.qkv", 72), ("single_blocks.1.linear1", 168)):
        one = weight("flux", "kohya", name)
        factors = pair((height, 24), 2, "F32", seed=height)
        tensors |= spelled(Part(one, 2, 1.0), factors, "kohya")
    adapter = understand(Bundle(tensors)).adapter
    assert adapter.architecture.id == "flux"
    there = again(convert(adapter, "diffusers"))
    assert {m.targets[0].path: m.shape for m in there.modules}["single_transformer_blocks.1.proj_mlp"] == (96, 24)
    whole = torch.cat([m.delta() for m in there.modules])
    assert torch.equal(whole, torch.cat([m.delta() for m in adapter.modules]))


# -- the way back is only for the file that was written --------------------------------------------------------------


def cut(bundle: Bundle, rank: int) -> Bundle:
    """What a resizing program leaves: every pair cut to `rank`, the header as it was."""
    tensors = {}
    for key, tensor in bundle.tensors.items():
        if ".lora_A" in key or ".lora_down" in key:
            tensor = LazyTensor.from_torch(tensor.load()[:rank].contiguous())
        elif ".lora_B" in key or ".lora_up" in key:
            tensor = LazyTensor.from_torch(tensor.load()[:, :rank].contiguous())
        tensors[key] = tensor
    return replace(bundle, tensors=tensors)


@each_pair
def test_a_file_changed_since_does_not_go_back(source: str, to: str) -> None:
    style = Style(metadata={"ss_network_dim": "4"})
    original = build(typical_parts("sd15", source, rank=4, alpha=4.0), source, style)
    there = convert(read(original, source, "sd15"), to).bundle
    resized = read(cut(there, 2), to, "sd15")
    back = convert(resized, source)
    assert not back.returned
    assert worst(resized, again(back)) == 0.0
    assert again(back).ranks == {2: len(resized.modules)}
    if "ss_network_dim" in back.bundle.metadata:
        assert back.bundle.metadata["ss_network_dim"] == "2"


def test_a_file_with_a_module_less_does_not_go_back() -> None:
    original = build(typical_parts("sd15", "kohya", alpha=2.0), "kohya")
    there = convert(read(original, "kohya", "sd15"), "diffusers").bundle
    first = next(iter(there.tensors)).partition(".lora_")[0]
    less = replace(there, tensors={key: t for key, t in there.tensors.items() if not key.startswith(first + ".")})
    back = convert(read(less, "diffusers", "sd15"), "kohya")
    assert not back.returned
    assert len(back.bundle.tensors) == len(original.tensors) - 3


@pytest.mark.parametrize("ticket", ["", "!", "AAAA", base64.b64encode(b"x" * 40).decode(), "{}"])
def test_a_broken_ticket_is_no_error(ticket: str) -> None:
    original = build(typical_parts("sd15", "kohya", alpha=2.0), "kohya")
    there = convert(read(original, "kohya", "sd15"), "diffusers").bundle
    broken = replace(there, metadata={**there.metadata, origin.ENTRY: ticket})
    back = convert(read(broken, "diffusers", "sd15"), "kohya")
    assert not back.returned
    assert_same_tensors(original, back.bundle)


def test_another_dtype_is_no_way_back() -> None:
    original = build(typical_parts("sd15", "kohya", alpha=2.0, dtype="F32"), "kohya")
    adapter = read(original, "kohya", "sd15")
    there = convert(adapter, "diffusers", dtype="BF16")
    assert {t.dtype for t in there.bundle.tensors.values()} == {"BF16"}
    assert 0 < worst(adapter, again(there)) <= ROUNDING["BF16"]
    back = convert(again(there), "kohya")
    # The ticket was written for the cast file, and leads to the original's keys: not to values that are gone.
    assert {t.dtype for key, t in back.bundle.tensors.items() if not key.endswith(".alpha")} == {"BF16"}


# -- metadata -------------------------------------------------------------------------------------------------------


def converted_file(tmp_path: Path, bundle: Bundle, to: str, **options: object) -> tuple[Report, Bundle]:
    source = write_file(tmp_path / ("in" if bundle.side_files else "in.safetensors"), bundle)
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    report = convert_file(source, to, output, **options)  # type: ignore[arg-type]
    return report, read_bundle(output)


@each_model
def test_kohya_files_state_true_facts(tmp_path: Path, architecture: str) -> None:
    original = build(typical_parts(architecture, "diffusers", rank=4, alpha=2.0), "diffusers")
    _, written = converted_file(tmp_path, original, "kohya")
    metadata = written.metadata
    assert float(metadata["ss_network_alpha"]) == 2.0 or metadata["ss_network_alpha"] == "Dynamic"
    assert metadata["ss_network_dim"] == "4" or metadata["ss_network_dim"] == "Dynamic"
    assert metadata["ss_network_module"] == ("networks.lora_flux" if architecture == "flux" else "networks.lora")
    expected = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}[architecture]
    assert metadata["ss_base_model_version"] == expected
    assert_hashes_are_true(tmp_path / "out.safetensors")


def assert_hashes_are_true(path: Path) -> None:
    """`sshs_model_hash` as sd-scripts computes it: SHA-256 behind the header of the file as it is without `sshs_*`."""
    import hashlib

    import safetensors.torch

    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.torch.load_file(path)
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    blob = safetensors.torch.save(tensors, kept)
    length = int.from_bytes(blob[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(blob[8 + length :]).hexdigest()
    legacy = hashlib.sha256(blob[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert metadata["sshs_legacy_hash"] == legacy


def test_one_rank_is_stated_as_it_is_and_many_as_dynamic(tmp_path: Path) -> None:
    rng = random.Random(3)
    parts = random_parts(rng, "sd15", "diffusers", 12, ranks=(2, 4), alphas=(1.0, 2.0))
    _, written = converted_file(tmp_path, build(parts, "diffusers"), "kohya")
    assert written.metadata["ss_network_dim"] == "Dynamic"
    assert written.metadata["ss_network_alpha"] == "Dynamic"


def test_what_described_the_old_spelling_is_gone() -> None:
    style = Style(metadata={"modelspec.hash_sha256": "0xabc", "title": "kept", "ss_network_dim": "99"})
    adapter = read(build(typical_parts("sd15", "diffusers", alpha=2.0), "diffusers", style), "diffusers", "sd15")
    header = convert(adapter, "kohya").bundle.metadata
    assert "lora_adapter_metadata" not in header and "modelspec.hash_sha256" not in header
    assert header["title"] == "kept"
    assert header["ss_network_dim"] == "4"


def test_history_grows(tmp_path: Path) -> None:
    adapter = read(build(typical_parts("sd15", "kohya"), "kohya"), "kohya", "sd15")
    once = again(convert(adapter, "diffusers"))
    twice = convert(once, "comfyui").bundle.metadata
    history = json.loads(twice["loratool.history"])
    assert [(entry["op"], entry["from"], entry["to"]) for entry in history] == [
        ("convert", "kohya", "diffusers"),
        ("convert", "diffusers", "comfyui"),
    ]


@pytest.mark.parametrize("history", ["", "{", "3", '{"a": 1}'])
def test_a_history_that_is_none_is_replaced(history: str) -> None:
    style = Style(metadata={"loratool.history": history})
    original = build(typical_parts("sd15", "kohya"), "kohya", style)
    there = convert(read(original, "kohya", "sd15"), "diffusers")
    assert len(json.loads(there.bundle.metadata["loratool.history"])) == 1
    assert_same_file(original, convert(again(there), "kohya").bundle)


@each_pair
def test_files_there_and_back_on_disk(tmp_path: Path, source: str, to: str) -> None:
    style = Style(metadata={"sshs_model_hash": "old", "ss_network_dim": "4"})
    original = build(typical_parts("flux", source, alpha=2.0), source, style)
    first = write_file(tmp_path / ("in" if source == "peft" else "in.safetensors"), original)
    middle = tmp_path / "middle.x"
    last = tmp_path / "last.x"
    there = convert_file(first, to, middle)
    back = convert_file(middle, source, last)
    assert there.proof is not None and there.proof.worst == 0.0 and there.proof.bitwise == there.proof.compared
    assert back.returned
    assert_same_file(read_bundle(first), read_bundle(last))


# -- extras ---------------------------------------------------------------------------------------------------------


def with_extras(bundle: Bundle, extras: Mapping[str, LazyTensor]) -> Bundle:
    return replace(bundle, tensors={**bundle.tensors, **extras})


SMALL = {"<s1>": LazyTensor.from_torch(torch.randn(768)), "bundle_emb.x": LazyTensor.scalar(3.0, "BF16")}
LARGE = {"lm_head.weight": LazyTensor.from_torch(torch.zeros(HEADER_ROOM // 4 + 1))}


@each_pair
def test_small_extras_ride_along_and_return(source: str, to: str) -> None:
    original = with_extras(build(typical_parts("sd15", source), source), SMALL)
    adapter = read(original, source, "sd15")
    assert list(adapter.extras) == list(SMALL)
    there = convert(adapter, to)
    assert set(there.carried) == set(SMALL)
    assert not set(there.bundle.tensors) & set(SMALL)
    assert_same_file(original, convert(again(there), source).bundle)


@each_pair
def test_large_extras_are_refused_and_dropped_on_demand(source: str, to: str) -> None:
    original = with_extras(build(typical_parts("sd15", source), source), LARGE)
    adapter = read(original, source, "sd15")
    with pytest.raises(NotRepresentable, match=r"lm_head\.weight") as caught:
        convert(adapter, to)
    assert "--drop-extras" in str(caught.value)
    assert caught.value.modules == ("lm_head.weight",)
    dropped = convert(adapter, to, drop_extras=True)
    assert dropped.dropped == ("lm_head.weight",)
    assert worst(adapter, again(dropped)) == 0.0


def test_the_same_layout_keeps_extras_where_they_are() -> None:
    original = with_extras(build(typical_parts("sd15", "kohya"), "kohya"), LARGE)
    same = convert(read(original, "kohya", "sd15"), "kohya")
    assert contents(same.bundle)["lm_head.weight"] == contents(original)["lm_head.weight"]
    assert not same.carried and not same.dropped


# -- shapes that models have ----------------------------------------------------------------------------------------


def test_a_convolution_stored_as_linear_gets_the_models_shape() -> None:
    """proj_in of SD 1.5 is a 1x1 convolution; some programs store its pair as matrices."""
    one = weight("sd15", "kohya", "down_blocks.0.attentions.0.proj_in")
    assert one.shape == (320, 320, 1, 1)
    flat = Weight(one.component, one.prefix, one.name, one.targets)
    original = Bundle(spelled(Part(flat, 2, 1.0), pair((320, 320), 2, "F32", 0), "kohya"))
    adapter = read(original, "kohya", "sd15")
    there = convert(adapter, "diffusers")
    stem = "unet.down_blocks.0.attentions.0.proj_in"
    assert there.bundle.tensors[f"{stem}.lora_A.weight"].shape == (2, 320, 1, 1)
    assert there.bundle.tensors[f"{stem}.lora_B.weight"].shape == (320, 2, 1, 1)
    assert worst(adapter, again(there)) == 0.0
    assert_same_file(original, convert(again(there), "kohya").bundle)


def test_a_linear_stored_as_convolution_gets_the_models_shape() -> None:
    """proj_in of SDXL is linear; files made for SD 1.x's shape store it with a 1x1 kernel."""
    one = weight("sdxl", "kohya", "input_blocks.4.1.proj_in")
    assert one.shape == (640, 640)
    original = Bundle(spelled(Part(one, 2, 1.0), pair((640, 640, 1, 1), 2, "F32", 0), "kohya"))
    adapter = read(original, "kohya", "sdxl")
    there = convert(adapter, "diffusers")
    stem = "unet.down_blocks.1.attentions.0.proj_in"
    assert there.bundle.tensors[f"{stem}.lora_A.weight"].shape == (2, 640)
    assert there.bundle.tensors[f"{stem}.lora_B.weight"].shape == (640, 2)
    assert worst(adapter, again(there)) == 0.0
    assert_same_file(original, convert(again(there), "kohya").bundle)


# -- what cannot be said --------------------------------------------------------------------------------------------


def dora(shape: tuple[int, ...], name: str = "double_blocks.0.img_attn.qkv") -> Bundle:
    part = Part(weight("flux", "kohya", name), 2, 2.0)
    stem = part.weight.prefix + name.replace(".", "_")
    magnitude = LazyTensor.from_torch(torch.rand(shape))
    return Bundle({**spelled(part, pair(part.weight.shape, 2, "F32", 0), "kohya"), f"{stem}.dora_scale": magnitude})


def test_dora_per_row_splits_and_returns() -> None:
    original = dora((9216, 1))
    adapter = read(original, "kohya", "flux")
    there = convert(adapter, "diffusers")
    stem = f"transformer.{K}.lora_magnitude_vector"
    assert [t.shape for key, t in there.bundle.tensors.items() if key.startswith(stem)] == [(3072,)]
    config = json.loads(there.bundle.metadata["lora_adapter_metadata"])
    assert config["transformer.use_dora"] is True
    assert worst(adapter, again(there)) == 0.0
    assert_same_file(original, convert(again(there), "kohya").bundle)


def test_dora_per_column_is_refused_where_it_is_split() -> None:
    adapter = read(dora((1, 3072)), "kohya", "flux")
    with pytest.raises(NotRepresentable, match="DoRA magnitude per input"):
        convert(adapter, "diffusers")
    assert again(convert(adapter, "comfyui")).modules[0].magnitude is not None


def test_lokr_travels_among_layouts_that_know_it_and_is_refused_by_others() -> None:
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {f"{stem}.lokr_w1": (8, 8), f"{stem}.lokr_w2": (1152, 384), f"{stem}.alpha": ()}
    original = Bundle({key: LazyTensor.from_torch(torch.rand(shape)) for key, shape in factors.items()})
    adapter = read(original, "kohya", "flux")
    assert_same_file(original, convert(again(convert(adapter, "comfyui")), "kohya").bundle)
    with pytest.raises((NotExact, NotRepresentable)) as caught:
        convert(adapter, "diffusers")
    assert "--approximate" in str(caught.value) or "cut a Kronecker block of 1152 rows" in str(caught.value)


def test_an_unknown_flattened_model_cannot_be_spelled_otherwise() -> None:
    shapes = {"lora_unet_blocks_0_q.lora_down.weight": (2, 8), "lora_unet_blocks_0_q.lora_up.weight": (8, 2)}
    bundle = Bundle({key: LazyTensor.from_torch(torch.rand(shape)) for key, shape in shapes.items()})
    adapter = understand(bundle).adapter
    with pytest.raises(UnknownModel, match="--base"):
        convert(adapter, "diffusers")
    assert_same_tensors(Bundle(shapes_and_alpha(bundle)), convert(adapter, "kohya").bundle)


def shapes_and_alpha(bundle: Bundle) -> dict[str, LazyTensor]:
    """With the alpha that kohya states for every module."""
    return {**bundle.tensors, "lora_unet_blocks_0_q.alpha": LazyTensor.scalar(2.0, "F32")}


def test_a_layout_that_is_only_read_is_refused() -> None:
    adapter = read(build(typical_parts("sd15", "kohya"), "kohya"), "kohya", "sd15")
    with pytest.raises(UsageError, match="only read"):
        convert(adapter, "cloneofsimo")


# -- the proof ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_corrupted_write_is_found_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    real = bundles.write_safetensors

    def corrupting(path: Path, *arguments: object, **options: object) -> None:
        real(path, *arguments, **options)  # type: ignore[arg-type]
        with Path(path).open("r+b") as file:
            file.seek(-3, 2)
            byte = file.read(1)[0]
            file.seek(-3, 2)
            file.write(bytes([byte ^ 0x41]))

    monkeypatch.setattr(bundles, "write_safetensors", corrupting)
    source = write_file(tmp_path / "in.safetensors", build(typical_parts("sd15", "kohya", dtype="F32"), "kohya"))
    before = source.read_bytes()
    monkeypatch.setattr("tests.builders.write_safetensors", real)
    with pytest.raises(NotTheSame, match="differs"):
        convert_file(source, to, tmp_path / "out.x")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
    assert source.read_bytes() == before
    report = convert_file(source, to, tmp_path / "out.x", verify=False)
    assert report.proof is None


def test_the_proof_sees_every_kind_of_difference() -> None:
    adapter = read(build(typical_parts("flux", "kohya", alpha=2.0), "kohya"), "kohya", "flux")
    first, *rest = adapter.modules
    other = LazyTensor.from_torch(first.factors["up"].load() * 1.5)
    for changed in (
        [replace(first, alpha=3.0), *rest],
        [replace(first, factors={**first.factors, "up": other}), *rest],
        rest,
    ):
        assert worst(adapter, replace(adapter, modules=tuple(changed))) > 0.1
    more = replace(adapter, modules=tuple(rest))
    assert worst(more, adapter) == 1.0


def test_the_input_is_only_read(tmp_path: Path) -> None:
    source = write_file(tmp_path / "in.safetensors", build(typical_parts("sdxl", "kohya", alpha=2.0), "kohya"))
    before, at = source.read_bytes(), source.stat().st_mtime_ns
    convert_file(source, "diffusers", tmp_path / "out.safetensors")
    assert (source.read_bytes(), source.stat().st_mtime_ns) == (before, at)
    assert open_adapter(source).size_bytes == len(before)
