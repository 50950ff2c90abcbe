"""sites: every module finds its rows, in every kind of checkpoint, and what finds none is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import read_checkpoint
from loratool.ops.blocks import block_weights
from loratool.ops.inputs import Input
from loratool.ops.open import open_adapter
from loratool.ops.sites import Fixed, Part, Site, Sites, find_sites
from tests.bakes import CONV, DIFFUSERS, KEYS, TEXT, K, Q, factors, kohya, noise, opened, peft, save

Shape = tuple[int, ...]
SHAPES: Mapping[str, Shape] = {Q: (16, 16), K: (16, 16), CONV: (16, 8, 3, 3), TEXT: (8, 8)}
F16, BF16, FP8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", {KEYS[stem]: noise(*shape, dtype=F16) for stem, shape in SHAPES.items()})


@pytest.fixture
def lora(tmp_path: Path) -> Adapter:
    return opened(tmp_path / "lora.safetensors", kohya(SHAPES))


def sites(path: Path, *adapters: Adapter | Input, dtype: str | None = None) -> Sites:
    inputs = [one if isinstance(one, Input) else Input(one) for one in adapters]
    return find_sites(read_checkpoint(path), inputs, dtype)


def rows(site: Site) -> list[tuple[int, int, int, float]]:
    """(first row that is changed, the row behind the last, the first row of the update, strength) of every part."""
    found = []
    for part in site.parts:
        start = part.span.start if isinstance(part, Part) else part.start
        found.append((part.first, part.last, start, part.strength))
    return found


def test_every_module_has_one_site_in_the_order_of_the_file(base: Path, lora: Adapter) -> None:
    found = sites(base, lora)
    assert [site.key for site in found.sites] == sorted(KEYS[stem] for stem in SHAPES)
    assert [site.component for site in found.sites] == ["text_encoder", "unet", "unet", "unet"]
    assert {site.key: rows(site) for site in found.sites} == {
        KEYS[stem]: [(0, shape[0], 0, 1.0)] for stem, shape in SHAPES.items()
    }
    assert all(site.dtype == site.tensor.dtype == "F16" and site.scale is None for site in found.sites)
    assert (found.unmatched, found.silent) == ((), 0)


def test_adapters_add_up_on_one_site_in_their_order(base: Path, lora: Adapter) -> None:
    found = sites(base, Input(lora, 0.5), Input(lora, -2.0))
    assert len(found.sites) == len(SHAPES)
    assert all([part.strength for part in site.parts] == [0.5, -2.0] for site in found.sites)


def test_strength_0_is_no_site_and_no_complaint(base: Path, lora: Adapter) -> None:
    found = sites(base, Input(lora, 0.0))
    assert (found.sites, found.unmatched, found.silent) == ((), (), len(SHAPES))


# -- rows -------------------------------------------------------------------------------------------------------------

QKV = "double_blocks.2.img_attn.qkv"
SPLIT = [f"transformer_blocks.2.attn.to_{x}" for x in "qkv"]


def flux(path: Path, modules: Mapping[str, Sequence[int]], layout: str) -> Adapter:
    if layout == "kohya":
        tensors = kohya({f"lora_unet_{name.replace('.', '_')}": shape for name, shape in modules.items()})
    else:
        made = {name: factors(shape) for name, shape in modules.items()}
        tensors = {f"transformer.{name}.lora_B.weight": up for name, (up, _) in made.items()}
        tensors |= {f"transformer.{name}.lora_A.weight": down for name, (_, down) in made.items()}
    return opened(path / "flux_lora.safetensors", tensors, "flux")


def test_a_fused_module_on_a_fused_weight_is_one_part(tmp_path: Path) -> None:
    base = save(tmp_path / "flux.safetensors", {f"{QKV}.weight": noise(24, 8)})
    (site,) = sites(base, flux(tmp_path, {QKV: (24, 8)}, "kohya")).sites
    assert (site.key, rows(site)) == (f"{QKV}.weight", [(0, 24, 0, 1.0)])


def test_a_fused_module_on_split_weights_is_one_part_of_each(tmp_path: Path) -> None:
    save(tmp_path / "flux" / "transformer" / "a.safetensors", {f"{name}.weight": noise(8, 8) for name in SPLIT})
    found = sites(tmp_path / "flux", flux(tmp_path, {QKV: (24, 8)}, "kohya"))
    assert {site.key: rows(site) for site in found.sites} == {
        f"{name}.weight": [(0, 8, 8 * number, 1.0)]
        for number, name in enumerate(("q", "k", "v"))
        for name in [SPLIT[number]]
    }


def test_split_modules_on_a_fused_weight_are_parts_of_one_site(tmp_path: Path) -> None:
    base = save(tmp_path / "flux.safetensors", {f"{QKV}.weight": noise(24, 8)})
    (site,) = sites(base, flux(tmp_path, {SPLIT[2]: (8, 8), SPLIT[0]: (8, 8)}, "diffusers")).sites
    assert sorted(rows(site)) == [(0, 8, 0, 1.0), (16, 24, 0, 1.0)]


def test_swapped_rows_are_two_parts(tmp_path: Path) -> None:
    """BFL stacks shift, scale; diffusers scale, shift."""
    base = save(tmp_path / "flux.safetensors", {"final_layer.adaLN_modulation.1.weight": noise(16, 8)})
    (site,) = sites(base, flux(tmp_path, {"norm_out.linear": (16, 8)}, "diffusers")).sites
    assert sorted(rows(site)) == [(0, 8, 8, 1.0), (8, 16, 0, 1.0)]
    (straight,) = sites(base, flux(tmp_path, {"final_layer.adaLN_modulation.1": (16, 8)}, "kohya")).sites
    assert rows(straight) == [(0, 16, 0, 1.0)]


def test_a_transposed_weight_says_so(tmp_path: Path) -> None:
    """OpenCLIP's text_projection; its neighbours are not."""
    stem = "conditioner.embedders.1.model."
    tensors = {
        f"{stem}text_projection": noise(8, 8),
        f"{stem}transformer.resblocks.3.attn.in_proj_weight": noise(24, 8),
    }
    base = save(tmp_path / "sdxl.safetensors", tensors)
    names = {"lora_te2_text_projection": (8, 8), "lora_te2_text_model_encoder_layers_3_self_attn_k_proj": (8, 8)}
    adapter = opened(tmp_path / "lora.safetensors", kohya(names), "sdxl")
    projection, fused = sorted(sites(base, adapter).sites, key=lambda site: len(site.key))
    for site, transposed, where in ((projection, True, (0, 8, 0, 1.0)), (fused, False, (8, 16, 0, 1.0))):
        (part,) = site.parts
        assert isinstance(part, Part)
        assert part.span.transposed is transposed
        assert rows(site) == [where]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ('"*": 0.5', [(0, 24, 0, 0.25)]),
        ('"*.to_q": 0.5', [(0, 8, 0, 0.25), (8, 24, 8, 0.5)]),
        ('"*.to_k": 0', [(0, 8, 0, 0.5), (16, 24, 16, 0.5)]),
        ('"*.to_q": 3\n"*.to_k": 2', [(0, 8, 0, 1.5), (8, 16, 8, 1.0), (16, 24, 16, 0.5)]),
        ('"*.to_q": 0\n"*.to_k": 0\n"*.to_v": 0', None),
    ],
)
def test_block_weights_part_a_fused_module(
    tmp_path: Path, gains: str, expected: list[tuple[int, int, int, float]] | None
) -> None:
    base = save(tmp_path / "flux.safetensors", {f"{QKV}.weight": noise(24, 8)})
    adapter = flux(tmp_path, {QKV: (24, 8)}, "kohya")
    (tmp_path / "blocks.yaml").write_text(gains, encoding="utf-8")
    blocks = block_weights(str(tmp_path / "blocks.yaml"), adapter.architecture)
    found = sites(base, Input(adapter, 0.5, blocks))
    assert [rows(site) for site in found.sites] == ([] if expected is None else [expected])
    assert found.silent == (expected is None)
    assert found.unmatched == ()


def test_all_parts_know_all_places_of_their_module(tmp_path: Path) -> None:
    """What a DoRA norm over columns needs, whatever part is baked."""
    folder = tmp_path / "flux" / "transformer"
    save(folder / "a.safetensors", {f"{name}.weight": noise(8, 8, seed=number) for number, name in enumerate(SPLIT)})
    found = sites(tmp_path / "flux", flux(tmp_path, {QKV: (24, 8)}, "kohya"))
    assert len(found.sites) == 3
    for site in found.sites:
        (part,) = site.parts
        assert isinstance(part, Part)
        assert [(span.key, span.start) for span, _, _ in part.places] == [
            (f"{name}.weight", 8 * number) for number, name in enumerate(SPLIT)
        ]


# -- what has no place ------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named_with_what_comes_nearest(tmp_path: Path, lora: Adapter) -> None:
    tensors = {KEYS[stem]: noise(*SHAPES[stem]) for stem in (Q, CONV)}
    found = sites(save(tmp_path / "part.safetensors", tensors), lora)
    assert [site.key for site in found.sites] == sorted(tensors)
    missing = {one.title: one for one in found.unmatched}
    assert len(missing) == 2
    k = missing["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"]
    assert (k.reason, k.nearest) == ("is not in the checkpoint", KEYS[Q].removesuffix(".weight"))
    assert k.adapter == lora.path
    text = missing["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    assert text.reason == "the checkpoint has no text_encoder"


def test_keys_that_are_no_module_are_told_with_what_comes_nearest(tmp_path: Path, base: Path) -> None:
    misspelled = Q.replace("to_q", "to_queue")
    tensors = kohya(SHAPES) | kohya({misspelled: SHAPES[Q]})  # a module: three keys
    tensors |= {"emb_params": noise(4, 8), "lora_unet_nonsense.lora_up.weight": noise(4, 4)}
    found = sites(base, opened(tmp_path / "lora.safetensors", tensors, "sd15"))
    nameless = "is no name in Stable Diffusion 1.x"
    assert {one.title: (one.reason, one.nearest) for one in found.unmatched} == {
        "emb_params": ("is no module that can be baked", None),
        "lora_unet_nonsense": (nameless, None),
        misspelled: (nameless, KEYS[Q].removesuffix(".weight")),
    }
    assert len(found.sites) == len(SHAPES)


def test_a_weight_of_another_size_is_refused(tmp_path: Path, lora: Adapter) -> None:
    tensors = {KEYS[stem]: noise(*shape) for stem, shape in SHAPES.items()} | {KEYS[Q]: noise(16, 12)}
    with pytest.raises(FormatError, match=r"\[16, 12\].*\[16, 16\].*another model"):
        sites(save(tmp_path / "other.safetensors", tensors), lora)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integer_weights_are_refused_by_name(tmp_path: Path, lora: Adapter, dtype: torch.dtype) -> None:
    tensors = {KEYS[stem]: noise(*shape) for stem, shape in SHAPES.items()} | {KEYS[K]: torch.ones(16, 16).to(dtype)}
    base = save(tmp_path / "quantised.safetensors", tensors)
    with pytest.raises(FormatError, match=r"nothing can be added to.*quantised") as caught:
        sites(base, lora)
    assert (caught.value.file, caught.value.key) == (str(base), KEYS[K])


def test_integers_that_nothing_is_added_to_are_no_matter(tmp_path: Path, lora: Adapter) -> None:
    tensors = {KEYS[stem]: noise(*shape, dtype=F16) for stem, shape in SHAPES.items()}
    base = save(tmp_path / "base.safetensors", {**tensors, "position_ids": torch.arange(77)})
    for dtype in (None, "BF16"):
        assert "position_ids" not in {site.key for site in sites(base, lora, dtype=dtype).sites}


# -- biases and whole tensors -----------------------------------------------------------------------------------------

MODEL = {"layer.a.weight": noise(6, 4), "layer.a.bias": noise(6), "layer.b.weight": noise(4, 6, seed=1)}
PEFT = {
    "layer.a.lora_A.weight": noise(2, 4),
    "layer.a.lora_B.weight": noise(6, 2),
    "layer.b.lora_A.weight": noise(2, 6),
    "layer.b.lora_B.weight": noise(4, 2),
}


def test_the_bias_of_a_module_is_added_to_the_bias_of_its_layer(tmp_path: Path) -> None:
    """PEFT's lora_bias, with the scale of the module."""
    base = save(tmp_path / "model.safetensors", MODEL)
    folder = peft(tmp_path / "lora", {**PEFT, "layer.a.lora_B.bias": noise(6)}, lora_alpha=6, lora_bias=True)
    found = {site.key: site for site in sites(base, Input(open_adapter(folder), 0.5)).sites}
    assert set(found) == set(MODEL)
    (bias,) = found["layer.a.bias"].parts
    assert isinstance(bias, Fixed)
    assert (bias.first, bias.last, bias.start, bias.strength, bias.replaces) == (0, 6, 0, 1.5, False)
    assert torch.equal(bias.values.load(), noise(6))


def test_a_bias_without_a_place_is_told(tmp_path: Path) -> None:
    base = save(tmp_path / "model.safetensors", MODEL)
    folder = peft(tmp_path / "lora", {**PEFT, "layer.b.lora_B.bias": noise(4)}, lora_bias=True)
    found = sites(base, open_adapter(folder))
    (told,) = found.unmatched
    assert told.title.endswith("layer.b (bias)") and "lora_bias" in told.reason
    assert {site.key for site in found.sites} == {"layer.a.weight", "layer.b.weight"}


def test_biases_of_a_fused_module_go_where_the_rows_go(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": noise(8, 8) for name in SPLIT} | {f"{name}.bias": noise(8) for name in SPLIT}
    save(tmp_path / "flux" / "transformer" / "a.safetensors", tensors)
    adapter = flux(tmp_path, {QKV: (24, 8)}, "kohya")
    (module,) = adapter.modules
    module = replace(module, factors={**module.factors, "bias": LazyTensor.from_torch(noise(24))})
    found = sites(tmp_path / "flux", replace(adapter, modules=(module,)))
    biases = {site.key: rows(site) for site in found.sites if site.key.endswith("bias")}
    assert biases == {f"{name}.bias": [(0, 8, 8 * number, 0.5)] for number, name in enumerate(SPLIT)}


def test_modules_to_save_replace_what_has_their_name_and_shape(tmp_path: Path) -> None:
    base = save(tmp_path / "model.safetensors", {**MODEL, "head.weight": noise(3, 4), "norm.weight": noise(4)})
    saved = {"head.weight": noise(3, 4, seed=9), "norm.weight": noise(5), "gone.weight": noise(2)}
    found = sites(base, Input(open_adapter(peft(tmp_path / "lora", {**PEFT, **saved})), 0.75))
    (whole,) = next(site for site in found.sites if site.key == "head.weight").parts
    assert isinstance(whole, Fixed)
    assert (whole.replaces, whole.strength, whole.first, whole.last) == (True, 0.75, 0, 3)
    assert torch.equal(whole.values.load(), saved["head.weight"])
    assert {one.title for one in found.unmatched} == {
        f"base_model.model.{name}" for name in ("norm.weight", "gone.weight")
    }


# -- fp8 --------------------------------------------------------------------------------------------------------------


def fp8_base(path: Path, scale_name: str, scale: torch.Tensor) -> Path:
    tensors = {KEYS[stem]: noise(*shape).to(FP8 if stem == Q else F16) for stem, shape in SHAPES.items()}
    return save(path / "fp8.safetensors", {**tensors, KEYS[Q].removesuffix("weight") + scale_name: scale})


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (16,), (16, 1)], ids=str)
def test_a_scale_is_found(tmp_path: Path, lora: Adapter, name: str, shape: Shape) -> None:
    base = fp8_base(tmp_path, name, torch.full(shape, 0.5))
    found = {site.key: site for site in sites(base, lora).sites}
    assert found[KEYS[Q]].scale_key == KEYS[Q].removesuffix("weight") + name
    assert [one.shape for one in [found[KEYS[Q]].scale] if one is not None] == [shape]
    assert all(site.scale is None for key, site in found.items() if key != KEYS[Q])
    assert len(found) == len(SHAPES)


@pytest.mark.parametrize("shape", [(2,), (2, 2), (1, 16), (4, 4), (16, 2)], ids=str)
def test_a_scale_for_blocks_is_refused(tmp_path: Path, lora: Adapter, shape: Shape) -> None:
    base = fp8_base(tmp_path, "weight_scale", torch.ones(shape))
    with pytest.raises(FormatError, match="block-wise scales are not supported") as caught:
        sites(base, lora)
    assert caught.value.key == KEYS[Q].removesuffix("weight") + "weight_scale"


def test_a_scale_beside_a_weight_that_is_no_fp8_means_nothing(tmp_path: Path, lora: Adapter) -> None:
    tensors = {KEYS[stem]: noise(*shape, dtype=F16) for stem, shape in SHAPES.items()}
    tensors[KEYS[Q].removesuffix("weight") + "weight_scale"] = torch.ones(3, 3)
    found = sites(save(tmp_path / "base.safetensors", tensors), lora)
    assert all(site.scale is None for site in found.sites)


# -- --dtype ----------------------------------------------------------------------------------------------------------


def test_a_cast_touches_every_float_of_another_dtype(tmp_path: Path, lora: Adapter) -> None:
    tensors = {KEYS[stem]: noise(*shape, dtype=F16) for stem, shape in SHAPES.items()}
    others = {"vae.a": noise(3), "vae.b": noise(3, 3, dtype=BF16), "ids": torch.arange(3), "flag": torch.tensor(True)}
    found = {
        site.key: site for site in sites(save(tmp_path / "b.safetensors", tensors | others), lora, dtype="BF16").sites
    }
    assert found.keys() == {*tensors, "vae.a"}
    assert all(site.dtype == "BF16" for site in found.values())
    assert found["vae.a"].parts == ()


def test_vectors_do_not_become_fp8(tmp_path: Path) -> None:
    tensors = {
        "w": noise(4, 4, dtype=F16),
        "norm": noise(4, dtype=F16),
        "scalar": noise(dtype=F16),
        "conv": noise(2, 2, 1, 1),
    }
    found = sites(save(tmp_path / "b.safetensors", tensors), dtype="F8_E4M3").sites
    assert {site.key for site in found} == {"w", "conv"}


@pytest.mark.parametrize("scheme", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
@pytest.mark.parametrize("dtype", ["F16", "F8_E5M2"])
def test_a_cast_leaves_scales_alone(tmp_path: Path, lora: Adapter, scheme: tuple[str, str], dtype: str) -> None:
    stem = KEYS[Q].removesuffix("weight")
    tensors = {KEYS[Q]: noise(16, 16).to(FP8), stem + scheme[0]: torch.tensor(0.5), stem + scheme[1]: torch.tensor(2.0)}
    found = sites(save(tmp_path / "b.safetensors", tensors), dtype=dtype).sites
    assert {site.key: site.scale_key for site in found} == {KEYS[Q]: stem + scheme[0]}


def test_without_adapters_and_with_its_own_dtype_there_is_nothing_to_do(base: Path) -> None:
    assert sites(base, dtype="F16").sites == ()


# -- several copies of the weights ------------------------------------------------------------------------------------


def test_every_variant_in_a_folder_is_baked(tmp_path: Path, lora: Adapter) -> None:
    for name, dtype in (("diffusion_pytorch_model.fp16", F16), ("diffusion_pytorch_model", torch.float32)):
        tensors = {DIFFUSERS[stem][1]: noise(*SHAPES[stem]).to(dtype) for stem in (Q, K, CONV)}
        save(tmp_path / "model" / "unet" / f"{name}.safetensors", tensors)
    save(tmp_path / "model" / "text_encoder" / "model.safetensors", {DIFFUSERS[TEXT][1]: noise(8, 8)})
    found = sites(tmp_path / "model", lora)
    assert found.unmatched == ()
    counts: dict[str, int] = {}
    for site in found.sites:
        counts[site.file.name] = counts.get(site.file.name, 0) + 1
    assert counts == {
        "text_encoder/model.safetensors": 1,
        "unet/diffusion_pytorch_model.fp16.safetensors": 3,
        "unet/diffusion_pytorch_model.safetensors": 3,
    }
    assert {site.dtype for site in found.sites} == {"F16", "F32"}


def test_shards_are_one_set(tmp_path: Path, lora: Adapter) -> None:
    for number, stem in enumerate((Q, K, CONV), 1):
        name = f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"
        save(tmp_path / "model" / "unet" / name, {DIFFUSERS[stem][1]: noise(*SHAPES[stem])})
    save(tmp_path / "model" / "text_encoder" / "model.safetensors", {DIFFUSERS[TEXT][1]: noise(8, 8)})
    found = sites(tmp_path / "model", lora)
    assert found.unmatched == ()
    assert [site.file.name.rpartition("model-")[2] for site in found.sites if site.component == "unet"] == [
        f"0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_the_same_name_in_two_components_is_not_mixed_up(tmp_path: Path) -> None:
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    for number in (1, 2):
        folder = "text_encoder" if number == 1 else "text_encoder_2"
        save(tmp_path / "model" / folder / "model.safetensors", {f"{name}.weight": noise(8, 8)})
    adapter = opened(tmp_path / "l.safetensors", kohya({f"lora_te2_{name.replace('.', '_')}": (8, 8)}), "sdxl")
    (site,) = sites(tmp_path / "model", adapter).sites
    assert site.file.name == "text_encoder_2/model.safetensors"
