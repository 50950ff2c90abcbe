"""Anima: Cosmos-Predict2's transformer of 2B, an adapter from a language model's text, and Qwen3 0.6B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loratool.architectures._cosmos import SPANS, CosmosTransformer, transformer_namings
from loratool.architectures._decoder import QWEN3_06B, decoder_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming
from loratool.core.target import Target

CONDITIONER = "text_conditioner"
TRANSFORMER = CosmosTransformer(layers=28, width=2048, channels=17)


def _text_conditioner() -> dict[str, Naming]:
    """The naming `native`, which is diffusers' as well. The original calls it `llm_adapter`."""
    return {"native": Naming({path: (Target(CONDITIONER, path, shape),) for path, shape in _conditioner()})}


def _conditioner() -> Iterator[tuple[str, tuple[int, ...]]]:
    width, head, mlp, vocabulary = 1024, 64, 4096, 32128
    yield "embed", (vocabulary, width)
    for index in range(6):
        block = f"blocks.{index}"
        for attention in ("self_attn", "cross_attn"):
            yield f"{block}.norm_{attention}", (width,)
            for part in "qkvo":
                yield f"{block}.{attention}.{part}_proj", (width, width)
            for part in "qk":
                yield f"{block}.{attention}.{part}_norm", (head,)
        yield f"{block}.norm_mlp", (width,)
        yield f"{block}.mlp.0", (mlp, width)
        yield f"{block}.mlp.2", (width, mlp)
    yield "out_proj", (width, width)
    yield "norm", (width,)


_NUMBERED = numbered("B", 0, 27)
_EVERY = ("QWEN", "LLM", "IN", *_NUMBERED, "OUT")

BLOCKS = Blocks(
    labels=_EVERY,
    spans=(Span("text_encoder", "hf", "", "QWEN"), Span(CONDITIONER, "native", "", "LLM"), *SPANS),
    lists=(_NUMBERED, _EVERY),
)

ARCHITECTURE = Architecture(
    id="anima",
    title="Anima",
    components={
        "transformer": partial(transformer_namings, TRANSFORMER),
        CONDITIONER: _text_conditioner,
        "text_encoder": partial(decoder_namings, QWEN3_06B, "text_encoder"),
    },
    outlines={
        "transformer": partial(transformer_namings, TRANSFORMER._replace(layers=1)),
        "text_encoder": partial(decoder_namings, QWEN3_06B._replace(layers=1), "text_encoder"),
    },
    writes={
        "kohya": {
            "transformer": Voice("lora_unet_", "native"),
            CONDITIONER: Voice("lora_unet_llm_adapter_", "native"),
            "text_encoder": Voice("lora_te_", "hf"),
        },
        "diffusers": {
            "transformer": Voice("transformer.", "diffusers"),
            CONDITIONER: Voice("text_conditioner.", "native"),
            "text_encoder": Voice("text_encoder.", "hf"),
        },
        "comfyui": {
            "transformer": Voice("diffusion_model.", "native"),
            CONDITIONER: Voice("diffusion_model.llm_adapter.", "native"),
            "text_encoder": Voice("text_encoders.qwen3_06b.transformer.model.", "hf"),
        },
        "peft": {
            "transformer": Voice("base_model.model.", "diffusers"),
            CONDITIONER: Voice("base_model.model.", "native"),
            "text_encoder": Voice("base_model.model.", "hf"),
        },
    },
    reads={
        "kohya": {
            "transformer": (
                Voice("lora_unet_", "diffusers"),
                Voice("lycoris_", "native"),  # LyCORIS's own wrapper, over the original or over diffusers
                Voice("lycoris_", "diffusers"),
            ),
            "text_encoder": (Voice("lora_te1_", "hf"), Voice("lora_te_model_", "hf")),
        },
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (Voice("transformer.", "native"), Voice("model.diffusion_model.", "native")),
            CONDITIONER: (Voice("transformer.llm_adapter.", "native"), Voice("text_conditioner.", "native")),
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "native"),
                Voice("base_model.model.transformer.", "diffusers"),
            ),
            CONDITIONER: (Voice("base_model.model.llm_adapter.", "native"),),
            "text_encoder": (Voice("base_model.model.model.", "hf"),),
        },
    },
    checkpoints=(
        Checkpoint(
            "native", {"transformer": Voice("net.", "native"), CONDITIONER: Voice("net.llm_adapter.", "native")}
        ),
        Checkpoint(
            "comfyui",
            {
                "transformer": Voice("model.diffusion_model.", "native"),
                CONDITIONER: Voice("model.diffusion_model.llm_adapter.", "native"),
                "text_encoder": Voice("text_encoders.qwen3_06b.transformer.model.", "hf"),
            },
        ),
        Checkpoint(
            "diffusers",
            {
                "transformer": Voice("", "diffusers"),
                CONDITIONER: Voice("", "native"),
                "text_encoder": Voice("", "hf"),
            },
        ),
    ),
    facts={
        "ss_base_model_version": "anima",
        "modelspec.architecture": "anima-preview/lora",
        "ss_network_module": "networks.lora_anima",
    },
    blocks=BLOCKS,
)
