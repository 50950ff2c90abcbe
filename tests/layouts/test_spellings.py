"""The spellings of single trainers: their contracts, keys as their sources write them, and who is taken for whom."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import NotExact, NotRepresentable, UsageError
from loratool.core.registry import architectures, layouts
from loratool.core.tensor import LazyTensor
from loratool.ops.compare import compare
from loratool.ops.convert import convert
from loratool.ops.open import layout_named, understand
from tests.builders import MORE, Part, Style, architecture_of, build, random_parts, typical_parts, weight
from tests.contracts import assert_same_tensors, check_layout

each_spelling = pytest.mark.parametrize(("layout", "architecture"), list(MORE), ids=map("-".join, MORE))
ALPHALESS = {"ai-toolkit"}

PAIR = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")
SD15_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP_Q = "text_model.encoder.layers.0.self_attn.q_proj"
IMG_QKV = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
TXT_QKV = [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]
SINGLE_QKV = [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"]


def noise(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> Bundle:
    """A bundle of these keys and shapes, each value another; alpha is 2."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(tuple(shape), generator=generator).half() if shape else torch.tensor(2.0).half()
        for key, shape in shapes.items()
    }
    return Bundle({key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()})


def assert_same_updates(left: Adapter, right: Adapter) -> None:
    differences = list(compare(left.modules, right.modules))
    assert differences
    assert all(one.error <= one.tolerance for one in differences)


def read(bundle: Bundle, layout: str, architecture: str) -> Adapter:
    return layouts()[layout].read(bundle, architecture_of(architecture))


# -- contracts ------------------------------------------------------------------------------------------------------


@each_spelling
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_contract(layout: str, architecture: str, dtype: str) -> None:
    alpha = 4.0 if layout in ALPHALESS else 2.0
    bundle = build(typical_parts(architecture, layout, alpha=alpha, dtype=dtype), layout)
    check_layout(layouts()[layout], bundle, architecture_of(architecture))


@each_spelling
@pytest.mark.parametrize("seed", range(3))
def test_contract_with_ranks_and_alphas_of_all_kinds(layout: str, architecture: str, seed: int) -> None:
    alphas = (None,) if layout in ALPHALESS else (0.5, 1.0, 3.0, 8.0, 1e-3)
    parts = random_parts(random.Random(seed), architecture, layout, count=12, alphas=alphas)
    style = Style(metadata={"ss_network_dim": "8", "title": "a ☃ of one’s own"})
    check_layout(layouts()[layout], build(parts, layout, style, seed), architecture_of(architecture))


@each_spelling
@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_there_and_back(layout: str, architecture: str, to: str) -> None:
    alpha = 4.0 if layout in ALPHALESS else 2.0
    bundle = build(typical_parts(architecture, layout, alpha=alpha, dtype="BF16"), layout)
    adapter = read(bundle, layout, architecture)
    there = convert(adapter, to)
    back = convert(layouts()[to].read(there.bundle, adapter.architecture), layout)
    assert back.returned
    assert_same_tensors(bundle, back.bundle)


@each_spelling
def test_from_the_common_layouts(layout: str, architecture: str) -> None:
    """The same update, targets and scales, out of diffusers' spelling, and every key is one that is read."""
    component = next(iter(MORE[layout, architecture]))
    typical = typical_parts(architecture, "diffusers", alpha=2.0, dtype="F32")
    parts = [part for part in typical if part.weight.component == component]
    source = read(build(parts, "diffusers"), "diffusers", architecture)
    there = convert(source, layout)
    again = layouts()[layout].read(there.bundle, source.architecture)
    assert not again.extras
    assert_same_updates(source, again)


# -- keys as they are written ---------------------------------------------------------------------------------------

KEYS = [
    # OneTrainer: modules/util/convert/lora/convert_flux_lora.py and convert_lora_util.py (legacy_diffusers, omi).
    ("onetrainer", "flux", "lora_transformer_transformer_blocks_0_attn_to_q", IMG_QKV[:1], PAIR),
    ("onetrainer", "flux", "lora_transformer_single_transformer_blocks_0_proj_mlp",
     ["single_transformer_blocks.0.proj_mlp"], PAIR),
    ("onetrainer", "flux", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", [CLIP_Q], PAIR),
    ("onetrainer", "flux", "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
     ["encoder.block.0.layer.0.SelfAttention.q"], PAIR),
    ("onetrainer", "sdxl", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"], PAIR),
    ("onetrainer", "sd15", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", [CLIP_Q], PAIR),
    ("omi", "flux", "transformer.double_blocks.0.img_attn.qkv.1", IMG_QKV[1:2], PAIR),
    ("omi", "flux", "transformer.single_blocks.0.linear1.3", ["single_transformer_blocks.0.proj_mlp"], PAIR),
    ("omi", "flux", "transformer.img_in.proj", ["x_embedder"], PAIR),
    ("omi", "flux", "transformer.final_layer.adaLN_modulation.1", ["norm_out.linear:shift", "norm_out.linear:scale"],
     PAIR),
    ("omi", "flux", f"clip_l.{CLIP_Q}", [CLIP_Q], PAIR),
    ("omi", "flux", "t5.encoder.block.0.layer.0.SelfAttention.q", ["encoder.block.0.layer.0.SelfAttention.q"], PAIR),
    ("omi", "sdxl", "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_k",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"], PAIR),
    ("omi", "sdxl", f"clip_g.{CLIP_Q}", [CLIP_Q], PAIR),
    # musubi-tuner: networks/lora_flux.py, prefix lora_unet_.
    ("musubi", "flux", "lora_unet_double_blocks_0_img_attn_qkv", IMG_QKV, PAIR),
    # LyCORIS: wrapper.py, LORA_PREFIX.
    ("lycoris", "flux", "lycoris_transformer_blocks_0_attn_to_k", IMG_QKV[1:2], PAIR),
    ("lycoris", "sd15", f"lycoris_{SD15_Q.replace('.', '_')}", [SD15_Q], PAIR),
    # ai-toolkit: toolkit/lora_special.py and network_mixins.py (peft_format).
    ("ai-toolkit", "flux", "transformer.transformer_blocks.0.attn.to_q", IMG_QKV[:1], A_B),
    ("ai-toolkit", "flux", "transformer.single_transformer_blocks.0.norm.linear",
     ["single_transformer_blocks.0.norm.linear"], A_B),
]  # fmt: skip


def one_module(
    architecture: str, stem: str, paths: Sequence[str], suffixes: tuple[str, str], alpha: bool = False
) -> Bundle:
    table = architecture_of(architecture)
    shapes = {
        target.path: target.shape
        for component in table.components
        for targets in next(iter(table.namings(component).values())).values()
        for target in targets
        if (component == "text_encoder_2") == any(two in stem for two in ("te2_", "clip_g.", "t5.", "encoder_2"))
    }
    rows, kernel = sum(shapes[path][0] for path in paths), shapes[paths[0]][2:]
    down, up = (f"{stem}.{suffix}" for suffix in suffixes)
    sizes: dict[str, Sequence[int]] = {down: (2, shapes[paths[0]][1], *kernel), up: (rows, 2, *(1,) * len(kernel))}
    return noise({**sizes, f"{stem}.alpha": ()} if alpha else sizes)


@pytest.mark.parametrize(("layout", "architecture", "stem", "paths", "suffixes"), KEYS)
def test_keys_as_programs_write_them(
    layout: str, architecture: str, stem: str, paths: list[str], suffixes: tuple[str, str]
) -> None:
    bundle = one_module(architecture, stem, paths, suffixes, alpha=suffixes is PAIR)
    adapter = read(bundle, layout, architecture)
    assert [[target.path for target in module.targets] for module in adapter.modules] == [paths]
    assert_same_tensors(bundle, layouts()[layout].write(adapter))


# layout, architecture, stem, targets, suffixes: read, but written otherwise or not at all.
READ = [
    # XLabs: x-flux; ComfyUI's lora_convert.py (USO) has the same names of single blocks.
    ("xlabs", "flux", "double_blocks.0.processor.qkv_lora1", IMG_QKV, ("down.weight", "up.weight")),
    ("xlabs", "flux", "double_blocks.0.processor.qkv_lora2", TXT_QKV, ("down.weight", "up.weight")),
    ("xlabs", "flux", "double_blocks.0.processor.proj_lora1", ["transformer_blocks.0.attn.to_out.0"],
     ("down.weight", "up.weight")),
    ("xlabs", "flux", "diffusion_model.double_blocks.0.processor.proj_lora2", ["transformer_blocks.0.attn.to_add_out"],
     ("down.weight", "up.weight")),
    ("xlabs", "flux", "single_blocks.0.processor.qkv_lora", SINGLE_QKV, ("down.weight", "up.weight")),
    ("xlabs", "flux", "single_blocks.0.processor.proj_lora", ["single_transformer_blocks.0.proj_out"],
     ("down.weight", "up.weight")),
    # Bare native names.
    ("native", "flux", "double_blocks.0.img_attn.qkv", IMG_QKV, A_B),
    ("native", "flux", "double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"], PAIR),
    # Stability AI's Control-LoRAs.
    ("control-lora", "sdxl", "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"], ("down", "up")),
    ("control-lora", "sdxl", "input_blocks.1.0.in_layers.2", ["down_blocks.0.resnets.0.conv1"], ("down", "up")),
    # fal's Kontext trainer, and PEFT's wrapper where another prefix already stands.
    ("peft", "flux", "base_model.model.double_blocks.0.img_attn.qkv", IMG_QKV, A_B),
    ("diffusers", "flux", "transformer.base_model.model.transformer_blocks.0.attn.to_q", IMG_QKV[:1], A_B),
    ("diffusers", "sdxl", "unet.base_model.model.mid_block.attentions.0.proj_in", ["mid_block.attentions.0.proj_in"],
     A_B),
    # Attention processors of every model that had them.
    ("diffusers", "sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"], ("down.weight", "up.weight")),
    ("diffusers", "sdxl", "unet.mid_block.attentions.0.transformer_blocks.9.attn2.processor.to_out_lora",
     ["mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0"], ("down.weight", "up.weight")),
    ("diffusers", "flux", "transformer.transformer_blocks.0.attn.processor.to_k_lora", IMG_QKV[1:2],
     ("down.weight", "up.weight")),
    ("diffusers", "flux", "transformer.transformer_blocks.0.attn.processor.add_q_proj_lora", TXT_QKV[:1],
     ("down.weight", "up.weight")),
    ("diffusers", "sd15", "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora", [CLIP_Q],
     ("down.weight", "up.weight")),
    # What ComfyUI takes: comfy/weight_adapter/lora.py.
    *(("comfyui", "flux", "diffusion_model.double_blocks.0.img_attn.qkv", IMG_QKV, suffixes) for suffixes in (
        A_B, PAIR, ("lora_A", "lora_B"), ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"))),
    # Wan-Fun's habit: a model inside a module without a name.
    ("kohya", "flux", "lora_unet__double_blocks_0_img_attn_qkv", IMG_QKV, PAIR),
    ("musubi", "flux", "lora_unet__double_blocks_0_img_attn_qkv", IMG_QKV, PAIR),
    ("musubi", "flux", "lora_unet_transformer_blocks_0_attn_to_q", IMG_QKV[:1], PAIR),
    ("ai-toolkit", "flux", "diffusion_model.double_blocks.0.img_attn.qkv", IMG_QKV, A_B),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "architecture", "stem", "paths", "suffixes"), READ)
def test_keys_that_are_only_read(
    layout: str, architecture: str, stem: str, paths: list[str], suffixes: tuple[str, str]
) -> None:
    bundle = one_module(architecture, stem, paths, suffixes)
    adapter = read(bundle, layout, architecture)
    assert [[target.path for target in module.targets] for module in adapter.modules] == [paths]
    assert not adapter.extras
    for to in ("diffusers", "comfyui"):
        there = convert(adapter, to)
        back = convert(layouts()[to].read(there.bundle, adapter.architecture), layout)
        assert back.returned or to == layout
        if to != layout:
            assert_same_tensors(bundle, back.bundle)


def test_comfyui_s_underscored_suffix() -> None:
    bundle = noise(
        {
            "diffusion_model.double_blocks.0.img_attn.proj_lora.down.weight": (2, 3072),
            "diffusion_model.double_blocks.0.img_attn.proj_lora.up.weight": (3072, 2),
        }
    )
    (module,) = read(bundle, "comfyui", "flux").modules
    assert module.targets[0].path == "transformer_blocks.0.attn.to_out.0"


@pytest.mark.parametrize(
    ("layout", "architecture"), [(one, other) for one in ("native", "xlabs") for other in ("flux",)]
)
def test_a_read_only_layout_is_not_written_unasked(layout: str, architecture: str) -> None:
    adapter = read(build(typical_parts(architecture, "kohya"), "kohya"), "kohya", architecture)
    with pytest.raises(UsageError, match="only read"):
        convert(adapter, layout)


# -- who is who -----------------------------------------------------------------------------------------------------


@each_spelling
def test_what_is_its_own_is_recognised(layout: str, architecture: str) -> None:
    """Equal spellings go to the common layout, unless the header names the program."""
    opened = understand(build(typical_parts(architecture, layout, alpha=4.0), layout))
    same = {("onetrainer", "sd15"): "kohya", ("musubi", "flux"): "kohya", ("ai-toolkit", "flux"): "diffusers"}
    expected = same.get((layout, architecture), layout)
    assert (opened.adapter.layout, opened.adapter.architecture.id) == (expected, architecture)
    assert not opened.adapter.extras


SIGNATURES = {
    "onetrainer": {"ot_revision": "abc"},
    "musubi": {"ss_network_module": "networks.lora_wan"},
    "ai-toolkit": {"software": json.dumps({"name": "ai-toolkit", "version": "0.1"})},
}


@pytest.mark.parametrize(
    ("layout", "architecture"), [("onetrainer", "sd15"), ("musubi", "flux"), ("ai-toolkit", "flux")]
)
def test_the_header_decides_between_equal_spellings(layout: str, architecture: str) -> None:
    bundle = build(typical_parts(architecture, layout, alpha=4.0), layout, Style(metadata=SIGNATURES[layout]))
    assert understand(bundle).adapter.layout == layout


def test_the_header_does_not_make_another_spelling_of_it() -> None:
    """OneTrainer writes kohya's spelling as well."""
    bundle = build(typical_parts("flux", "kohya"), "kohya", Style(metadata=SIGNATURES["onetrainer"]))
    assert understand(bundle).adapter.layout == "kohya"


@pytest.mark.parametrize("name", ["a1111", "webui", "forge", "sd-scripts", "kohya"])
def test_other_names_of_kohya(name: str) -> None:
    assert layout_named(name) == "kohya"


def test_no_name_means_two_layouts() -> None:
    names = [name for layout in layouts().values() for name in (layout.id, *layout.names)]
    assert len(set(names)) == len(names)


def test_every_voice_of_every_layout_exists() -> None:
    """Derived voices, too: of every model, in every size, without two meanings of one spelling."""
    for architecture in (one for one in architectures().values() if not one.open):
        for layout in layouts().values():
            said: dict[str, object] = {}
            if layout.folder:
                continue  # one component to a folder
            for component, voice in layout.voices(architecture):
                naming = architecture.naming(component, voice.naming)
                for name, targets in naming.items():
                    text = name if layout.separator == "." else name.replace(".", layout.separator)
                    spelling = voice.prefix + text
                    assert said.setdefault(spelling, targets) == targets, f"{layout.id} {architecture.id} {spelling}"


# -- scales without a place -----------------------------------------------------------------------------------------


def scaled(layout: str, alpha: float, dtype: str) -> Adapter:
    one = weight("flux", "kohya", "double_blocks.0.img_attn.proj")
    return read(build([Part(one, 4, alpha, dtype)], "kohya"), "kohya", "flux")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 16.0])
def test_a_power_of_two_goes_into_the_factors(alpha: float, dtype: str) -> None:
    source = scaled("ai-toolkit", alpha, dtype)
    made = convert(source, "ai-toolkit")
    assert not any(key.endswith(".alpha") for key in made.bundle.tensors)
    again = layouts()["ai-toolkit"].read(made.bundle, source.architecture)
    assert_same_updates(source, again)
    assert again.modules[0].scale == 1.0
    back = convert(again, "kohya")
    assert back.returned
    assert_same_tensors(Bundle(source.stored), back.bundle)


def test_another_scale_needs_wider_factors() -> None:
    source = scaled("ai-toolkit", 3.0, "BF16")
    with pytest.raises(NotRepresentable, match="without rounding") as caught:
        convert(source, "ai-toolkit")
    assert "--dtype fp32" in str(caught.value)
    made = convert(source, "ai-toolkit", dtype="F32")
    assert_same_updates(source, layouts()["ai-toolkit"].read(made.bundle, source.architecture))


def test_what_leaves_the_range_of_the_factors_is_refused() -> None:
    """float16 has few small numbers: a quarter of some of them is no float16."""
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    down, up = (torch.full(shape, 1.0).half() for shape in ((4, 3072), (3072, 4)))
    alpha = torch.tensor(1.0)

    def adapter() -> Adapter:
        tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
        return read(Bundle({k: LazyTensor.from_torch(t.clone()) for k, t in tensors.items()}), "kohya", "flux")

    up[5, 2] = 6e-8  # the smallest of all: down takes the scale
    made = convert(adapter(), "ai-toolkit")
    (module,) = layouts()["ai-toolkit"].read(made.bundle, architecture_of("flux")).modules
    assert torch.equal(module.factors["up"].load(), up)
    assert torch.equal(module.factors["down"].load(), down / 4)
    back = convert(layouts()["ai-toolkit"].read(made.bundle, architecture_of("flux")), "kohya")
    assert back.returned
    assert_same_tensors(Bundle(adapter().stored), back.bundle)
    down[1, 7] = 6e-8
    with pytest.raises(NotExact, match="F16 cannot hold") as caught:
        convert(adapter(), "ai-toolkit")
    assert "--dtype fp32" in str(caught.value)


def test_text_encoders_have_no_place_where_none_is_trained() -> None:
    adapter = read(build(typical_parts("flux", "kohya"), "kohya"), "kohya", "flux")
    for layout in ("lycoris", "musubi", "ai-toolkit"):
        with pytest.raises(NotRepresentable, match="no spelling for text_encoder"):
            convert(replace(adapter), layout)


def test_a_dora_of_onetrainer() -> None:
    """Keys and shapes of a file that OneTrainer wrote (InvokeAI's test data, of its issue 6912): magnitudes per input
    column, which PEFT's spelling has no words for and OneTrainer's other one has."""
    linears = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj": (768, 768),
        "lora_transformer_single_transformer_blocks_0_attn_to_k": (3072, 3072),
        "lora_transformer_single_transformer_blocks_0_proj_mlp": (12288, 3072),
        "lora_transformer_transformer_blocks_0_ff_context_net_2": (3072, 12288),
    }
    shapes: dict[str, Sequence[int]] = {}
    for stem, (out, columns) in linears.items():
        shapes |= {f"{stem}.lora_down.weight": (4, columns), f"{stem}.lora_up.weight": (out, 4), f"{stem}.alpha": ()}
        shapes[f"{stem}.dora_scale"] = (1, columns)
    bundle = noise({**shapes, "bundle_emb.<ball>.clip_l": (2, 768)})
    adapter = understand(bundle).adapter
    assert (adapter.layout, adapter.architecture.id) == ("onetrainer", "flux")
    assert list(adapter.extras) == ["bundle_emb.<ball>.clip_l"]
    assert all(m.magnitude is not None and not m.magnitude_per_row for m in adapter.modules)
    there = convert(adapter, "omi")
    back = convert(layouts()["omi"].read(there.bundle, adapter.architecture), "onetrainer")
    assert back.returned
    assert_same_tensors(bundle, back.bundle)
    with pytest.raises(NotRepresentable, match="DoRA magnitude per input feature"):
        convert(adapter, "diffusers")


@pytest.mark.parametrize("small", [None, "up", "down"])
def test_a_fused_float16_weight_comes_back(small: str | None) -> None:
    """The parts of one weight keep sharing their factor, whichever takes the scale."""
    one = weight("flux", "kohya", "double_blocks.0.img_attn.qkv")
    bundle = build([Part(one, 4, 2.0, "F32")], "kohya")
    values = {key: tensor.load().clamp(min=0.01).half() for key, tensor in bundle.tensors.items() if tensor.shape}
    for key, tensor in values.items():
        if small is not None and f"_{small}." in key:
            tensor[3000 if small == "up" else 1, 0] = 6e-8
    stored = {key: LazyTensor.from_torch(tensor) for key, tensor in values.items()}
    alpha = {key: LazyTensor.scalar(2.0, "F16") for key in bundle.tensors if key.endswith(".alpha")}
    source = read(Bundle({**stored, **alpha}), "kohya", "flux")
    made = convert(source, "ai-toolkit")
    assert len(made.adapter.modules) == 3
    back = convert(layouts()["ai-toolkit"].read(made.bundle, source.architecture), "kohya")
    assert back.returned
    assert_same_tensors(Bundle(source.stored), back.bundle)
