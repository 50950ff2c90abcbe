"""Every layout against its contract, the keys of the real world, and files that other programs wrote."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import FormatError, LoratoolError, NotRepresentable
from loratool.core.registry import layouts
from loratool.core.tensor import LazyTensor
from loratool.ops.convert import convert
from loratool.ops.inspect import inspect
from loratool.ops.open import open_adapter, understand
from tests.builders import (
    ARCHITECTURES,
    LAYOUTS,
    Part,
    Style,
    architecture_of,
    build,
    contents,
    only,
    random_parts,
    shuffled,
    typical_parts,
    weight,
    weights,
    zero_file,
)
from tests.contracts import assert_same_tensors, check_layout

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def zeros(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float16) -> Bundle:
    """A bundle of these keys and shapes."""
    return Bundle({key: LazyTensor.from_torch(torch.zeros(shape, dtype=dtype)) for key, shape in shapes.items()})


# -- write(read(x)) == x --------------------------------------------------------------------------------------------


@each_model
@each_layout
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_contract(layout: str, architecture: str, dtype: str) -> None:
    bundle = build(typical_parts(architecture, layout, alpha=2.0, dtype=dtype), layout)
    check_layout(layouts()[layout], bundle, architecture_of(architecture))


@each_model
@each_layout
@pytest.mark.parametrize("seed", range(3))
def test_contract_with_ranks_and_alphas_of_all_kinds(layout: str, architecture: str, seed: int) -> None:
    parts = random_parts(random.Random(seed), architecture, layout, count=12, alphas=(0.5, 1.0, 3.0, 8.0, 1e-3))
    style = Style(metadata={"ss_network_dim": "8", "title": "a ☃ of one’s own"})
    check_layout(layouts()[layout], build(parts, layout, style, seed), architecture_of(architecture))


@each_model
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_contract_without_alpha(layout: str, architecture: str) -> None:
    alpha = None if layout == "diffusers" else 4.0
    attention = [one for one in weights(architecture, layout) if one.name.endswith((".to_q", ".qkv", ".q_proj"))]
    bundle = build([Part(one, 4, alpha) for one in attention[:12]], layout)
    assert not any(key.endswith(".alpha") for key in bundle.tensors)
    check_layout(layouts()[layout], bundle, architecture_of(architecture))
    assert "lora_adapter_metadata" not in layouts()[layout].write(read(bundle, layout, architecture)).metadata


def read(bundle: Bundle, layout: str, architecture: str) -> Adapter:
    return layouts()[layout].read(bundle, architecture_of(architecture))


@each_model
@each_layout
def test_no_tensor_is_read_but_alpha(layout: str, architecture: str) -> None:
    bundle = build(typical_parts(architecture, layout, alpha=2.0), layout)

    def refuse() -> torch.Tensor:
        raise AssertionError("a factor was read")

    lazy = {
        key: tensor if key.endswith(".alpha") else LazyTensor.computed(tensor.shape, tensor.dtype, refuse)
        for key, tensor in bundle.tensors.items()
    }
    opened = understand(Bundle(lazy, bundle.metadata, bundle.side_files))
    assert opened.adapter.layout == layout
    assert {module.scale for module in opened.adapter.modules} == {0.5}


# -- the real world's keys ------------------------------------------------------------------------------------------

# layout, architecture, stem as programs write it, the weights it updates, (down, up) suffixes.
KOHYA = ("lora_down.weight", "lora_up.weight")
TODAY = ("lora_A.weight", "lora_B.weight")
SD15_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP_Q = "text_model.encoder.layers.0.self_attn.q_proj"
SINGLE = "single_transformer_blocks.0"
WRITTEN = [
    ("kohya", "sd15", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", [SD15_Q], KOHYA),
    ("kohya", "sd15", "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
     ["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"], KOHYA),
    ("kohya", "sd15", "lora_unet_up_blocks_3_attentions_2_proj_out", ["up_blocks.3.attentions.2.proj_out"], KOHYA),
    ("kohya", "sd15", "lora_unet_down_blocks_0_downsamplers_0_conv", ["down_blocks.0.downsamplers.0.conv"], KOHYA),
    ("kohya", "sd15", "lora_unet_down_blocks_1_resnets_0_conv_shortcut", ["down_blocks.1.resnets.0.conv_shortcut"],
     KOHYA),
    ("kohya", "sd15", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", [CLIP_Q], KOHYA),
    ("kohya", "sd15", "lora_te_text_model_encoder_layers_11_mlp_fc2", ["text_model.encoder.layers.11.mlp.fc2"], KOHYA),
    ("kohya", "sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"], KOHYA),
    ("kohya", "sdxl", "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2",
     ["down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2"], KOHYA),
    ("kohya", "sdxl", "lora_unet_middle_block_1_proj_in", ["mid_block.attentions.0.proj_in"], KOHYA),
    ("kohya", "sdxl", "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_out_0",
     ["up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"], KOHYA),
    ("kohya", "sdxl", "lora_unet_input_blocks_1_0_in_layers_2", ["down_blocks.0.resnets.0.conv1"], KOHYA),
    ("kohya", "sdxl", "lora_unet_input_blocks_1_0_emb_layers_1", ["down_blocks.0.resnets.0.time_emb_proj"], KOHYA),
    ("kohya", "sdxl", "lora_unet_input_blocks_3_0_op", ["down_blocks.0.downsamplers.0.conv"], KOHYA),
    ("kohya", "sdxl", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", [CLIP_Q], KOHYA),
    ("kohya", "sdxl", "lora_te2_text_model_encoder_layers_31_mlp_fc1", ["text_model.encoder.layers.31.mlp.fc1"], KOHYA),
    ("kohya", "flux", "lora_unet_double_blocks_0_img_attn_qkv",
     [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"], KOHYA),
    ("kohya", "flux", "lora_unet_double_blocks_18_txt_attn_qkv",
     [f"transformer_blocks.18.attn.add_{part}_proj" for part in "qkv"], KOHYA),
    ("kohya", "flux", "lora_unet_double_blocks_0_txt_mod_lin", ["transformer_blocks.0.norm1_context.linear"], KOHYA),
    ("kohya", "flux", "lora_unet_double_blocks_0_img_mlp_2", ["transformer_blocks.0.ff.net.2"], KOHYA),
    ("kohya", "flux", "lora_unet_single_blocks_0_linear1",
     [*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp"], KOHYA),
    ("kohya", "flux", "lora_unet_single_blocks_37_linear2", ["single_transformer_blocks.37.proj_out"], KOHYA),
    ("kohya", "flux", "lora_unet_final_layer_adaLN_modulation_1", ["norm_out.linear:shift", "norm_out.linear:scale"],
     KOHYA),
    ("kohya", "flux", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", [CLIP_Q], KOHYA),
    ("kohya", "flux", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", ["encoder.block.0.layer.0.SelfAttention.q"],
     KOHYA),
    ("diffusers", "sd15", f"unet.{SD15_Q}", [SD15_Q], TODAY),
    ("diffusers", "sd15", f"text_encoder.{CLIP_Q}", [CLIP_Q], TODAY),
    ("diffusers", "sdxl", "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_out.0",
     ["down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_out.0"], TODAY),
    ("diffusers", "sdxl", "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
     ["text_model.encoder.layers.31.self_attn.out_proj"], TODAY),
    ("diffusers", "flux", "transformer.transformer_blocks.0.attn.to_add_out", ["transformer_blocks.0.attn.to_add_out"],
     TODAY),
    ("diffusers", "flux", f"transformer.{SINGLE}.proj_mlp", [f"{SINGLE}.proj_mlp"], TODAY),
    ("diffusers", "flux", "transformer.norm_out.linear", ["norm_out.linear:scale", "norm_out.linear:shift"], TODAY),
    ("diffusers", "flux", "transformer.time_text_embed.guidance_embedder.linear_1",
     ["time_text_embed.guidance_embedder.linear_1"], TODAY),
    ("peft", "sd15", f"base_model.model.{SD15_Q}", [SD15_Q], TODAY),
    ("peft", "flux", "base_model.model.transformer_blocks.0.attn.to_q", ["transformer_blocks.0.attn.to_q"], TODAY),
    ("comfyui", "sd15", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", [SD15_Q], TODAY),
    ("comfyui", "sdxl", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_k",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"], TODAY),
    ("comfyui", "sdxl", f"text_encoders.clip_g.transformer.{CLIP_Q}", [CLIP_Q], TODAY),
    ("comfyui", "flux", "diffusion_model.double_blocks.0.img_attn.qkv",
     [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"], TODAY),
    ("comfyui", "flux", f"text_encoders.clip_l.transformer.{CLIP_Q}", [CLIP_Q], TODAY),
]  # fmt: skip

# Read, but written otherwise today.
READ = [
    ("kohya", "sdxl", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"], KOHYA),
    ("kohya", "sdxl", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
     ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"], None),  # `to_k_lora.down`: what 0.36 exports
    ("kohya", "sd15", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", [CLIP_Q], KOHYA),
    ("kohya", "flux", "lora_transformer_transformer_blocks_0_attn_to_q", ["transformer_blocks.0.attn.to_q"], KOHYA),
    ("kohya", "flux", "lycoris_single_transformer_blocks_0_proj_mlp", [f"{SINGLE}.proj_mlp"], KOHYA),
    ("diffusers", "sd15", f"unet.{SD15_Q}", [SD15_Q], ("lora.down.weight", "lora.up.weight")),
    ("diffusers", "sd15", f"unet.{SD15_Q[:-5]}.processor.to_q_lora", [SD15_Q], ("down.weight", "up.weight")),
    ("diffusers", "sd15", f"{SD15_Q[:-5]}.processor.to_q_lora", [SD15_Q], ("down.weight", "up.weight")),
    ("diffusers", "sd15", f"unet.{SD15_Q[:-5]}.processor.to_out_lora", [SD15_Q[:-5] + ".to_out.0"],
     ("down.weight", "up.weight")),
    ("diffusers", "sd15", f"text_encoder.{CLIP_Q}", [CLIP_Q],
     ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
    ("diffusers", "sd15", "text_encoder.encoder.layers.0.self_attn.q_proj", [CLIP_Q], TODAY),
    ("peft", "flux", "base_model.model.transformer_blocks.0.attn.to_q", ["transformer_blocks.0.attn.to_q"],
     ("lora_A.default.weight", "lora_B.default.weight")),
    ("peft", "sd15", "base_model.model.encoder.layers.0.self_attn.q_proj", [CLIP_Q], TODAY),
    ("comfyui", "flux", "diffusion_model.double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"], KOHYA),
    ("comfyui", "flux", "double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"], TODAY),
    ("comfyui", "flux", "transformer.double_blocks.0.img_attn.qkv.1", ["transformer_blocks.0.attn.to_k"], TODAY),
]  # fmt: skip


def one_module(layout: str, architecture: str, stem: str, paths: list[str], suffixes: tuple[str, str] | None) -> Bundle:
    """A file with one module, of the real model's size."""
    table = architecture_of(architecture)
    shapes = {
        target.path: target.shape
        for component in table.components
        for targets in next(iter(table.namings(component).values())).values()
        for target in targets
        if component != "text_encoder" or not any(second in stem for second in ("te2", "clip_g", "encoder_2"))
    }
    rows = sum(shapes[path][0] for path in paths)
    kernel = shapes[paths[0]][2:]
    down, up = (f"{stem}.{suffix}" for suffix in suffixes) if suffixes else (
        f"{stem}_lora.down.weight", f"{stem}_lora.up.weight")  # fmt: skip
    tensors = {down: (2, shapes[paths[0]][1], *kernel), up: (rows, 2, *(1,) * len(kernel))}
    if layout == "kohya":
        tensors[f"{stem}.alpha"] = ()
    return zeros(tensors)


@pytest.mark.parametrize(("layout", "architecture", "stem", "paths", "suffixes"), WRITTEN)
def test_keys_as_programs_write_them(
    layout: str, architecture: str, stem: str, paths: list[str], suffixes: tuple[str, str]
) -> None:
    bundle = one_module(layout, architecture, stem, paths, suffixes)
    adapter = read(bundle, layout, architecture)
    assert [[target.path for target in module.targets] for module in adapter.modules] == [paths]
    assert_same_tensors(bundle, layouts()[layout].write(adapter))


@pytest.mark.parametrize(("layout", "architecture", "stem", "paths", "suffixes"), READ)
def test_keys_of_other_times(
    layout: str, architecture: str, stem: str, paths: list[str], suffixes: tuple[str, str] | None
) -> None:
    bundle = one_module(layout, architecture, stem, paths, suffixes)
    adapter = read(bundle, layout, architecture)
    assert [[target.path for target in module.targets] for module in adapter.modules] == [paths]
    assert not adapter.extras
    if len(paths) > 1 or "txt" in stem or ".qkv." in stem:
        return  # written grouped otherwise: that is regroup's
    converted = convert(adapter, layout).bundle
    assert not set(converted.tensors) & {key for key in bundle.tensors if not key.endswith(".alpha")} or (
        suffixes in (TODAY, KOHYA)
    )


def test_two_spellings_of_one_key_are_an_error() -> None:
    stem = f"unet.{SD15_Q}"
    bundle = zeros({f"{stem}.lora_A.weight": (2, 320), f"{stem}.lora.down.weight": (2, 320)})
    with pytest.raises(FormatError, match="spelled twice"):
        read(bundle, "diffusers", "sd15")


def test_two_modules_on_one_target_are_an_error() -> None:
    fused, alone = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_transformer_blocks_0_attn_to_q"
    bundle = zeros(
        {
            f"{fused}.lora_down.weight": (2, 3072),
            f"{fused}.lora_up.weight": (9216, 2),
            f"{alone}.lora_down.weight": (2, 3072),
            f"{alone}.lora_up.weight": (3072, 2),
        }
    )
    with pytest.raises(FormatError, match="spelled twice"):
        read(bundle, "kohya", "flux")


# -- detection ------------------------------------------------------------------------------------------------------


@each_model
@each_layout
def test_what_we_build_is_recognised(layout: str, architecture: str) -> None:
    bundle = build(typical_parts(architecture, layout), layout)
    opened = understand(bundle)
    assert (opened.adapter.layout, opened.adapter.architecture.id) == (layout, architecture)
    assert opened.detection.best.resolved == 1.0
    assert opened.detection.best.fitting == 1.0


@each_model
@each_layout
def test_the_order_of_keys_means_nothing(layout: str, architecture: str) -> None:
    bundle = build(typical_parts(architecture, layout, alpha=2.0), layout)
    mixed = shuffled(bundle, random.Random(1))
    first, second = understand(bundle), understand(mixed)
    assert first.detection.best.score == second.detection.best.score
    assert (first.adapter.layout, first.adapter.architecture) == (second.adapter.layout, second.adapter.architecture)
    facts = [{(m.targets, m.scale, m.rank) for m in opened.adapter.modules} for opened in (first, second)]
    assert facts[0] == facts[1]
    for target in LAYOUTS:
        assert contents(convert(first.adapter, target).bundle) == contents(convert(second.adapter, target).bundle)


@pytest.mark.parametrize(("columns", "architecture"), [(768, "sd15"), (2048, "sdxl")])
@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_sizes_tell_models_with_the_same_names_apart(columns: int, architecture: str, layout: str) -> None:
    stem = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    prefix = {"diffusers": "unet.", "peft": "base_model.model.", "kohya": "lora_unet_"}[layout]
    down, up = KOHYA if layout == "kohya" else TODAY
    name = prefix + (stem.replace(".", "_") if layout == "kohya" else stem)
    opened = understand(zeros({f"{name}.{down}": (4, columns), f"{name}.{up}": (640, 4)}))
    # kohya has other names for SDXL's UNet: with diffusers' it is OneTrainer's spelling.
    written = "onetrainer" if (layout, architecture) == ("kohya", "sdxl") else layout
    assert (opened.adapter.layout, opened.adapter.architecture.id) == (written, architecture)
    assert not opened.detection.tie


@pytest.mark.parametrize(
    ("stem", "suffixes", "rows", "expected", "rivals"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", TODAY, 640, "generic", {"sd15", "sdxl"}),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", KOHYA, 768, "unknown", {"sd15", "sdxl", "flux"}),
        (f"text_encoder.{CLIP_Q}", TODAY, 768, "generic", {"sd15", "sdxl", "flux"}),
    ],
)
def test_what_fits_several_models_is_called_unknown(
    stem: str, suffixes: tuple[str, str], rows: int, expected: str, rivals: set[str]
) -> None:
    down, up = suffixes
    bundle = zeros({f"{stem}.{down}": (4, rows), f"{stem}.{up}": (rows, 4)})
    opened = understand(bundle)
    assert opened.adapter.architecture.id == expected
    assert set(opened.detection.tie) >= rivals
    (note,) = (note for note in opened.adapter.notes if "could be any of" in note)
    assert all(rival in note for rival in rivals) and "--architecture" in note
    named = understand(bundle, architecture_of("sdxl"))
    assert named.adapter.architecture.id == "sdxl"
    assert not named.adapter.extras


def test_half_a_file_of_unknown_names_is_not_believed() -> None:
    known = [part.weight.name for part in typical_parts("sd15", "diffusers") if part.weight.component == "unet"][:3]
    names = [*known, *(f"strange.{i}.linear" for i in range(4))]
    shapes = {f"unet.{name}.{end}": (4, 4) for name in names for end in TODAY}
    opened = understand(zeros(shapes))
    assert opened.adapter.architecture.id == "generic"
    assert opened.detection.runner_up is not None
    assert opened.detection.runner_up.architecture.id in ("sd15", "sdxl")


def test_unread_keys_are_extras_and_do_not_disturb() -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    strange = {
        "strange.thing": LazyTensor.scalar(1.0, "F32"),
        "lora_unet_conv_in.bias_values": LazyTensor.scalar(2.0, "F32"),
    }
    adapter = understand(Bundle({**bundle.tensors, **strange})).adapter
    assert adapter.architecture.id == "sd15"
    assert set(adapter.extras) == set(strange)
    assert adapter.unread_families == {"sparse bias": 1}


# -- files of other programs ----------------------------------------------------------------------------------------

FILES = {
    "kohya/sd15_lora.safetensors": ("kohya", "sd15", 264, 0),
    "kohya/sd15_locon.safetensors": ("kohya", "sd15", 350, 0),
    "kohya/sdxl_lora.safetensors": ("kohya", "sdxl", 986, 0),
    "kohya/flux_lora.safetensors": ("kohya", "flux", 101, 0),
    "diffusers-0.36/sd15_script.safetensors": ("diffusers", "sd15", 176, 0),
    "diffusers-0.36/sdxl_script_kohya.safetensors": ("kohya", "sdxl", 736, 0),
    "diffusers-0.36/flux_script.safetensors": ("diffusers", "flux", 81, 0),
    "real/lora_disney.safetensors": ("cloneofsimo", "sd15", 192, 2),
}
"""file -> layout, architecture, modules, unread keys."""

KEYS = {
    "flux-kohya": ("kohya", "flux", 304),
    "flux-diffusers": ("diffusers", "flux", 494),
    "flux-ai-toolkit": ("comfyui", "flux", 228),
    "flux-control": ("native", "flux", 466),
    "flux-xlabs": ("xlabs", "flux", 12),
    "qwen-image-diffusers": ("comfyui", "qwen-image", 3),
    "anima-kohya": ("kohya", "anima", 11),
    "anima-peft": ("comfyui", "anima", 6),
}
"""keys/*.json -> layout, architecture, modules. Models that come later are honestly unknown."""


def shared(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    return path


@pytest.mark.parametrize("name", FILES)
def test_files_are_recognised(name: str) -> None:
    info = inspect(shared(name))
    layout, architecture, modules, unread = FILES[name]
    assert (info.layout, info.architecture, info.modules) == (layout, architecture, modules)
    assert len(info.unread_keys) == unread
    assert info.architecture_score > 0.98
    assert info.standard_width == name.startswith("real/")


def test_every_shared_file_is_tried() -> None:
    if not DATA.is_dir():
        pytest.skip("no shared data here")
    there = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*.safetensors")}
    assert there >= set(FILES)


@pytest.mark.parametrize("name", KEYS)
def test_users_files_are_recognised(tmp_path: Path, name: str) -> None:
    shapes = json.loads(shared(f"keys/{name}.json").read_text(encoding="utf-8"))
    info = inspect(zero_file(tmp_path / f"{name}.safetensors", shapes))
    assert (info.layout, info.architecture, info.modules) == KEYS[name]
    if name.startswith("flux"):
        # 76 norm scales twice over: a control LoRA trains them, too. Its img_in is twice as wide: a size of its own.
        assert not info.unread_keys
        assert info.standard_width
        assert info.architecture_title == ("FLUX.1 Canny / Depth" if name == "flux-control" else "FLUX.1")
    else:
        assert info.architecture_score == 1.0
        assert not info.unread_keys


@pytest.mark.parametrize("name", ["flux-xlabs"])
def test_models_and_layouts_of_later_are_met_with_grace(tmp_path: Path, name: str) -> None:
    shapes = json.loads(shared(f"keys/{name}.json").read_text(encoding="utf-8"))
    path = zero_file(tmp_path / f"{name}.safetensors", shapes)
    try:
        info = inspect(path)
    except LoratoolError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert info.modules


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("to", LAYOUTS)
def test_files_convert_and_come_back(name: str, to: str) -> None:
    adapter = open_adapter(shared(name))
    converted = convert(adapter, to)
    again = layouts()[to].read(converted.bundle, adapter.architecture)
    before, after = ({target for m in one.modules for target in m.targets} for one in (adapter, again))
    assert after >= before  # a fused weight names all of its parts, those without an update too
    if not layouts()[adapter.layout].writable or to == adapter.layout:
        return
    back = convert(again, adapter.layout)
    assert back.returned
    original = Bundle(adapter.stored, adapter.metadata)
    assert_same_tensors(original, back.bundle)
    assert back.bundle.metadata == adapter.metadata


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(("diffusers-0.36/s", "real/"))])
def test_files_keep_the_contract(name: str) -> None:
    """For files in today's spelling; the others are read only, or written in today's."""
    adapter = open_adapter(shared(name))
    bundle = Bundle(adapter.stored, adapter.metadata)
    check_layout(layouts()[adapter.layout], bundle, adapter.architecture)


# -- what single layouts say ----------------------------------------------------------------------------------------


def scales(adapter: Adapter) -> dict[str, float]:
    return {module.targets[0].path: module.scale for module in adapter.modules}


def peft(config: Mapping[str, object], ranks: Mapping[str, int]) -> Adapter:
    """Modules of an unknown model of 8 x 8, by name and rank."""
    shapes = {}
    for name, rank in ranks.items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, 8)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (8, rank)
    bundle = Bundle(zeros(shapes).tensors, {}, {"adapter_config.json": json.dumps(config)})
    return understand(bundle).adapter


def test_peft_patterns_match_the_end_of_a_path() -> None:
    config = {"r": 4, "lora_alpha": 4, "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 8, r"layers\.1\.mlp\.k": 1}}
    names = {"layers.0.q": 2, "layers.0.xq": 4, "layers.1.mlp.k": 4, "layers.11.mlp.k": 4}
    found = scales(peft(config, names))
    assert found == {"layers.0.q": 4.0, "layers.0.xq": 1.0, "layers.1.mlp.k": 0.25, "layers.11.mlp.k": 1.0}


def test_peft_rslora_is_alpha_over_the_root() -> None:
    found = scales(peft({"r": 4, "lora_alpha": 6, "use_rslora": True}, {"a.q": 4, "a.k": 9}))
    assert found == {"a.q": 3.0, "a.k": 2.0}


def test_peft_writes_patterns_that_mean_the_same() -> None:
    adapter = peft(
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"q": 1}}, {"a.q": 4, "b.a.q": 2, "a.q.x": 4, "b.k": 8, "c.k": 8}
    )
    written = layouts()["peft"].write(adapter)
    again = layouts()["peft"].read(written, adapter.architecture)
    assert scales(again) == pytest.approx(scales(adapter), rel=1e-15)
    config = json.loads(written.side_files["adapter_config.json"])
    assert not config["use_rslora"]


def test_peft_without_config_says_that_alpha_is_unknown() -> None:
    bundle = zeros({"base_model.model.a.q.lora_A.weight": (2, 8), "base_model.model.a.q.lora_B.weight": (8, 2)})
    assert any("alpha is unknown" in note for note in understand(bundle).adapter.notes)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"peft_type": "LOHA"}',
        '{"lora_alpha": "much"}',
        '{"alpha_pattern": 3}',
        '{"alpha_pattern": {"(": 1}, "lora_alpha": 1}',
    ],
)
def test_peft_configs_that_make_no_sense(config: str) -> None:
    shapes = {"base_model.model.a.q.lora_A.weight": (2, 8), "base_model.model.a.q.lora_B.weight": (8, 2)}
    with pytest.raises(FormatError):
        understand(Bundle(zeros(shapes).tensors, {}, {"adapter_config.json": config}))


def test_modules_to_save_are_kept_as_extras() -> None:
    shapes = {
        "base_model.model.a.q.lora_A.weight": (2, 8),
        "base_model.model.a.q.lora_B.weight": (8, 2),
        "base_model.model.lm_head.weight": (16, 8),
    }
    bundle = Bundle(zeros(shapes).tensors, {}, {"adapter_config.json": '{"r": 2, "lora_alpha": 2}'})
    assert list(understand(bundle).adapter.extras) == ["base_model.model.lm_head.weight"]


def test_peft_embeddings_and_magnitudes_do_not_end_in_weight() -> None:
    stem = "base_model.model.embed_tokens"
    shapes = {f"{stem}.lora_embedding_A": (2, 100), f"{stem}.lora_embedding_B": (8, 2)}
    conv = "base_model.model.conv"
    shapes |= {f"{conv}.lora_A.weight": (2, 4, 3, 3), f"{conv}.lora_B.weight": (6, 2, 1, 1)}
    shapes |= {f"{conv}.lora_magnitude_vector": (1, 6, 1, 1)}
    sides = {"adapter_config.json": '{"r": 2, "lora_alpha": 2}'}
    adapter = understand(Bundle(zeros(shapes).tensors, {}, sides)).adapter
    by_name = {module.targets[0].path: module for module in adapter.modules}
    assert by_name["embed_tokens"].shape == (100, 8)
    assert by_name["conv"].magnitude is not None and by_name["conv"].magnitude.shape == (6, 1, 1, 1)


def test_diffusers_metadata_rules_unless_alpha_stands_beside() -> None:
    part = Part(weight("sd15", "diffusers", SD15_Q), rank=4, alpha=2.0)
    bundle = build([part], "diffusers")
    assert [m.alpha for m in read(bundle, "diffusers", "sd15").modules] == [2.0]
    beside = {**bundle.tensors, f"unet.{SD15_Q}.alpha": LazyTensor.scalar(8.0, "F32")}
    assert [m.alpha for m in read(Bundle(beside, bundle.metadata), "diffusers", "sd15").modules] == [8.0]


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.lora_alpha": []}'])
def test_diffusers_metadata_that_makes_no_sense(text: str) -> None:
    bundle = build(
        [Part(weight("sd15", "diffusers", SD15_Q))], "diffusers", Style(metadata={"lora_adapter_metadata": text})
    )
    with pytest.raises(FormatError):
        read(bundle, "diffusers", "sd15")


def test_kohya_alpha_is_a_number_in_the_factors_dtype() -> None:
    bundle = build(typical_parts("sd15", "kohya", rank=4, alpha=1.0, dtype="BF16"), "kohya")
    written = layouts()["kohya"].write(read(bundle, "kohya", "sd15"))
    assert {(t.dtype, t.shape) for k, t in written.tensors.items() if k.endswith(".alpha")} == {("BF16", ())}
    without = only(bundle, lambda key: not key.endswith(".alpha"))
    written = layouts()["kohya"].write(read(without, "kohya", "sd15"))
    assert {t.item() for k, t in written.tensors.items() if k.endswith(".alpha")} == {4.0}


def test_a_square_convolutions_magnitude_is_per_row_in_peft() -> None:
    stem = "conv"
    shapes = {f"{stem}.lora_A.weight": (2, 6, 3, 3), f"{stem}.lora_B.weight": (6, 2, 1, 1)}
    shapes |= {f"{stem}.lora_magnitude_vector": (1, 6, 1, 1)}
    for prefix, layout in (("base_model.model.", "peft"), ("unet.", "diffusers")):
        bundle = zeros({prefix + key: shape for key, shape in shapes.items()})
        (module,) = read(bundle, layout, "generic").modules
        assert module.magnitude is not None and module.magnitude.shape == (6, 1, 1, 1)
        written = layouts()[layout].write(read(bundle, layout, "generic"))
        assert [t.shape for key, t in written.tensors.items() if "magnitude" in key] == [(1, 6, 1, 1)]


def test_an_alpha_that_bf16_cannot_hold_is_written_wider() -> None:
    adapter = peft({"r": 4, "lora_alpha": 1.1}, {"unet.a": 4})
    bundle = build([Part(weight("sd15", "peft", SD15_Q), 4, 1.1, "BF16")], "peft")
    adapter = read(bundle, "peft", "sd15")
    written = layouts()["kohya"].write(adapter)
    (alpha,) = (t for k, t in written.tensors.items() if k.endswith(".alpha"))
    assert alpha.dtype == "F64" and alpha.item() == 1.1


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_an_alpha_of_several_numbers_is_refused(shape: tuple[int, ...]) -> None:
    bundle = build([Part(weight("sd15", "kohya", SD15_Q))], "kohya")
    stem = "lora_unet_" + SD15_Q.replace(".", "_")
    broken = Bundle({**bundle.tensors, f"{stem}.alpha": LazyTensor.from_torch(torch.zeros(shape))})
    with pytest.raises(FormatError, match="alpha has shape"):
        read(broken, "kohya", "sd15")


def test_a_layout_without_a_word_for_it_says_so() -> None:
    stem = "lora_unet_" + SD15_Q.replace(".", "_")
    bundle = zeros({f"{stem}.lokr_w1": (4, 4), f"{stem}.lokr_w2": (80, 80)})
    adapter = read(bundle, "kohya", "sd15")
    with pytest.raises(NotRepresentable) as caught:
        convert(adapter, "diffusers")
    assert caught.value.modules == (f"unet.{SD15_Q}",)
    assert convert(adapter, "comfyui").bundle.tensors.keys() == {
        f"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lokr_w{i}" for i in (1, 2)
    }


def test_comfyui_spells_a_tucker_core_with_the_pair_it_expects() -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    bundle = zeros(
        {
            f"{stem}.lora_down.weight": (2, 320, 1, 1),
            f"{stem}.lora_mid.weight": (2, 2, 3, 3),
            f"{stem}.lora_up.weight": (320, 2, 1, 1),
        }
    )
    keys = convert(read(bundle, "kohya", "sd15"), "comfyui").bundle.tensors.keys()
    assert keys == {
        f"diffusion_model.input_blocks.1.0.in_layers.2.lora_{part}.weight" for part in ("up", "down", "mid")
    }
