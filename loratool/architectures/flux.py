"""FLUX.1 (dev, schnell, Kontext, ...): the transformer, CLIP-L and T5-XXL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from loratool.architectures._clip import clip_l_namings
from loratool.architectures._t5 import T5_XXL, t5_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming
from loratool.core.target import Target

COMPONENT = "transformer"

Row = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]
"""(BFL name, its parts in row order: (diffusers path, shape))."""


class FluxTransformer(NamedTuple):
    """The sizes of a Flux transformer. `guidance` is False for schnell, which has no guidance embedder."""

    double: int = 19
    single: int = 38
    width: int = 3072
    head: int = 128
    mlp_ratio: int = 4
    channels: int = 64
    context: int = 4096
    pooled: int = 768
    time: int = 256
    guidance: bool = True


@dataclass(slots=True)
class _Tables:
    diffusers: dict[str, tuple[Target, ...]] = field(default_factory=dict)
    bfl: dict[str, tuple[Target, ...]] = field(default_factory=dict)
    omi: dict[str, tuple[Target, ...]] = field(default_factory=dict)
    xlabs: dict[str, tuple[Target, ...]] = field(default_factory=dict)
    tensor_keys: dict[str, str] = field(default_factory=dict)


def transformer_namings(spec: FluxTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical), `bfl` (q, k, v and the MLP fused), `omi` and `xlabs`.

    `omi` is OneTrainer's: BFL's names, but fused weights in numbered parts (`img_attn.qkv.0`). `xlabs` is that of
    XLabs' attention processors, which split a single block's linear1 into q, k, v and the MLP; they have no other
    weights, so that the rest is named as BFL does.
    """
    tables = _Tables()
    for name, parts in _rows(spec):
        targets = tuple(Target(COMPONENT, path, shape) for path, shape in parts)
        tables.bfl[name] = targets
        tables.xlabs |= _xlabs_names(name, targets)
        if name.endswith("_norm"):
            tables.tensor_keys[name] = f"{name}.scale"
        if _is_final_modulation(name):
            # diffusers stacks scale on shift, everyone else shift on scale.
            tables.diffusers[targets[0].module_path] = tuple(reversed(targets))
            tables.omi[name] = targets
            continue
        for index, target in enumerate(targets):
            tables.diffusers[target.path] = (target,)
            tables.omi[_omi_name(name, index, len(targets))] = (target,)
    return {
        "diffusers": Naming(tables.diffusers),
        "bfl": Naming(tables.bfl, tables.tensor_keys),
        "omi": Naming(tables.omi, tables.tensor_keys),
        "xlabs": Naming(tables.xlabs, tables.tensor_keys),
    }


def _is_final_modulation(name: str) -> bool:
    return name == "final_layer.adaLN_modulation.1"


def _omi_name(name: str, index: int, parts: int) -> str:
    if name == "img_in":
        return "img_in.proj"
    return name if parts == 1 else f"{name}.{index}"


_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}
"""BFL's names inside a block -> those of XLabs' processors."""


def _xlabs_names(name: str, targets: tuple[Target, ...]) -> dict[str, tuple[Target, ...]]:
    kind, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    block = f"{kind}.{number}."
    if inner == "linear1":
        return {f"{block}processor.qkv_lora": targets[:3], f"{block}linear1.mlp": targets[3:]}
    return {block + _XLABS[inner] if inner in _XLABS else name: targets}


def _rows(spec: FluxTransformer) -> Iterator[Row]:
    width = spec.width
    yield "img_in", (("x_embedder", (width, spec.channels)),)
    yield "txt_in", (("context_embedder", (width, spec.context)),)
    yield from _embedder("time_in", "timestep_embedder", width, spec.time)
    yield from _embedder("vector_in", "text_embedder", width, spec.pooled)
    if spec.guidance:
        yield from _embedder("guidance_in", "guidance_embedder", width, spec.time)
    for index in range(spec.double):
        yield from _double_block(index, spec)
    for index in range(spec.single):
        yield from _single_block(index, spec)
    shift, scale = ((f"norm_out.linear:{part}", (width, width)) for part in ("shift", "scale"))
    yield "final_layer.adaLN_modulation.1", (shift, scale)
    yield "final_layer.linear", (("proj_out", (spec.channels, width)),)


def _embedder(name: str, embedder: str, width: int, size: int) -> Iterator[Row]:
    yield f"{name}.in_layer", ((f"time_text_embed.{embedder}.linear_1", (width, size)),)
    yield f"{name}.out_layer", ((f"time_text_embed.{embedder}.linear_2", (width, width)),)


_STREAMS = (
    # BFL's stream, then diffusers': modulation, (q, k, v), output, query norm, key norm, feed-forward.
    ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_q", "norm_k", "ff"),
    (
        "txt",
        "norm1_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "norm_added_q",
        "norm_added_k",
        "ff_context",
    ),
)


def _double_block(index: int, spec: FluxTransformer) -> Iterator[Row]:
    name, path = f"double_blocks.{index}", f"transformer_blocks.{index}"
    width, mlp = spec.width, spec.width * spec.mlp_ratio
    for stream, modulation, qkv, out, query_norm, key_norm, feed_forward in _STREAMS:
        attention = f"{name}.{stream}_attn"
        yield f"{name}.{stream}_mod.lin", ((f"{path}.{modulation}.linear", (6 * width, width)),)
        yield f"{attention}.qkv", tuple((f"{path}.attn.{part}", (width, width)) for part in qkv)
        yield f"{attention}.norm.query_norm", ((f"{path}.attn.{query_norm}", (spec.head,)),)
        yield f"{attention}.norm.key_norm", ((f"{path}.attn.{key_norm}", (spec.head,)),)
        yield f"{attention}.proj", ((f"{path}.attn.{out}", (width, width)),)
        yield f"{name}.{stream}_mlp.0", ((f"{path}.{feed_forward}.net.0.proj", (mlp, width)),)
        yield f"{name}.{stream}_mlp.2", ((f"{path}.{feed_forward}.net.2", (width, mlp)),)


def _single_block(index: int, spec: FluxTransformer) -> Iterator[Row]:
    name, path = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
    width, mlp = spec.width, spec.width * spec.mlp_ratio
    qkv = tuple((f"{path}.attn.{part}", (width, width)) for part in ("to_q", "to_k", "to_v"))
    yield f"{name}.modulation.lin", ((f"{path}.norm.linear", (3 * width, width)),)
    yield f"{name}.linear1", (*qkv, (f"{path}.proj_mlp", (mlp, width)))
    yield f"{name}.norm.query_norm", ((f"{path}.attn.norm_q", (spec.head,)),)
    yield f"{name}.norm.key_norm", ((f"{path}.attn.norm_k", (spec.head,)),)
    # Its input is attention and MLP side by side, in the same order in both namings: no cut.
    yield f"{name}.linear2", ((f"{path}.proj_out", (width, width + mlp)),)


def _transformer() -> dict[str, Naming]:
    return transformer_namings(FluxTransformer())


def _text_encoder_2() -> dict[str, Naming]:
    return t5_namings(T5_XXL, "text_encoder_2")


_NUMBERED_BLOCKS = (*numbered("D", 0, 18), *numbered("S", 0, 37))
_EVERY_BLOCK = ("CLIP", "T5", "IN", *_NUMBERED_BLOCKS, "OUT")

BLOCKS = Blocks(
    labels=_EVERY_BLOCK,
    spans=(
        Span("text_encoder", "hf", "", "CLIP"),
        Span("text_encoder_2", "hf", "", "T5"),
        Span(COMPONENT, "bfl", "double_blocks.", "D{}"),
        Span(COMPONENT, "bfl", "single_blocks.", "S{}"),
        Span(COMPONENT, "bfl", "final_layer.", "OUT"),
        Span(COMPONENT, "bfl", "", "IN"),  # img_in, txt_in, time_in, vector_in, guidance_in
    ),
    # 61 values is the list of sd-webui-lora-block-weight.
    lists=(_NUMBERED_BLOCKS, _EVERY_BLOCK),
)

ARCHITECTURE = Architecture(
    id="flux",
    title="FLUX.1",
    components={"transformer": _transformer, "text_encoder": clip_l_namings, "text_encoder_2": _text_encoder_2},
    writes={
        "kohya": {
            "transformer": Voice("lora_unet_", "bfl"),
            "text_encoder": Voice("lora_te1_", "hf"),
            "text_encoder_2": Voice("lora_te3_", "hf"),
        },
        "diffusers": {
            "transformer": Voice("transformer.", "diffusers"),
            "text_encoder": Voice("text_encoder.", "hf"),
            "text_encoder_2": Voice("text_encoder_2.", "hf"),
        },
        "comfyui": {
            "transformer": Voice("diffusion_model.", "bfl"),
            "text_encoder": Voice("text_encoders.clip_l.transformer.", "hf"),
            "text_encoder_2": Voice("text_encoders.t5xxl.transformer.", "hf"),
        },
        # PEFT needs the exact path: today's CLIPTextModel has no `text_model.`, the one with projection has.
        "peft": {
            "transformer": Voice("base_model.model.", "diffusers"),
            "text_encoder": Voice("base_model.model.", "hf-short"),
            "text_encoder_2": Voice("base_model.model.", "hf"),
        },
        "xlabs": {"transformer": Voice("", "xlabs")},
    },
    reads={
        "xlabs": {"transformer": (Voice("diffusion_model.", "xlabs"),)},  # as ComfyUI's wrapper of x-flux saves it
        "kohya": {
            "transformer": (
                Voice("lora_unet_", "diffusers"),
                Voice("lora_transformer_", "diffusers"),  # OneTrainer
                Voice("lycoris_", "diffusers"),  # LyCORIS's own wrapper: SimpleTuner, old ai-toolkit
            ),
            "text_encoder": (Voice("lora_te1_", "hf-short"),),
            "text_encoder_2": (Voice("lora_te2_", "hf"),),  # OneTrainer
        },
        "diffusers": {
            "transformer": (Voice("", "diffusers"),),
            "text_encoder": (Voice("text_encoder.", "hf-short"),),
        },
        "comfyui": {
            "transformer": (
                Voice("", "bfl"),  # BFL's own control LoRAs
                Voice("model.diffusion_model.", "bfl"),
                Voice("transformer.", "omi"),  # OneTrainer
            ),
            "text_encoder": (
                Voice("text_encoders.clip_l.transformer.", "hf-short"),
                Voice("clip_l.transformer.", "hf"),
            ),
            "text_encoder_2": (Voice("t5xxl.transformer.", "hf"),),
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "bfl"),  # fal's Kontext trainer
                Voice("base_model.model.transformer.", "diffusers"),
            ),
            "text_encoder": (
                Voice("base_model.model.", "hf"),
                Voice("base_model.model.text_encoder.", "hf"),
                Voice("base_model.model.text_encoder.", "hf-short"),
            ),
            "text_encoder_2": (Voice("base_model.model.text_encoder_2.", "hf"),),
        },
    },
    checkpoints=(
        Checkpoint("bfl", {"transformer": Voice("", "bfl")}),
        Checkpoint(
            "comfyui",
            {
                "transformer": Voice("model.diffusion_model.", "bfl"),
                "text_encoder": Voice("text_encoders.clip_l.transformer.", "hf"),
                "text_encoder_2": Voice("text_encoders.t5xxl.transformer.", "hf"),
            },
        ),
        Checkpoint(
            "diffusers",
            {"transformer": Voice("", "diffusers"), "text_encoder": Voice("", "hf"), "text_encoder_2": Voice("", "hf")},
        ),
        # What transformers >= 5.6 saves.
        Checkpoint(
            "diffusers-short",
            {
                "transformer": Voice("", "diffusers"),
                "text_encoder": Voice("", "hf-short"),
                "text_encoder_2": Voice("", "hf"),
            },
        ),
    ),
    facts={"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"},
    blocks=BLOCKS,
)
