"""LTX-2 and LTX-2.3 (video with sound): the transformer, and the connectors between the text encoder and it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._ltx import attention, caption, feed_forward, modulation
from loratool.architectures._rows import Row, one, two_namings
from loratool.core.architecture import Architecture, Checkpoint, Variant, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming


class Ltx2(NamedTuple):
    """What tells LTX-2.3 from LTX-2: gates in every attention, modulated cross-attention, and larger connectors that
    project the text for video and sound apart."""

    gated: bool
    connector_layers: int
    video_connector: int
    audio_connector: int
    video: int = 4096
    audio: int = 2048
    heads: int = 32
    layers: int = 48
    channels: int = 128
    text: int = 3840
    text_layers: int = 49

    @property
    def gates(self) -> int:
        """Gates of an attention."""
        return self.heads if self.gated else 0


LTX_2_0 = Ltx2(gated=False, connector_layers=2, video_connector=3840, audio_connector=3840)
LTX_2_3 = Ltx2(gated=True, connector_layers=8, video_connector=4096, audio_connector=2048)


def transformer_namings(spec: Ltx2) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, one to one."""
    return two_namings(_rows(spec))


def _rows(spec: Ltx2) -> Iterator[Row]:
    chunks = 9 if spec.gated else 6
    for sound, width in (("", spec.video), ("audio_", spec.audio)):
        yield one(f"{sound}patchify_proj", f"{sound}proj_in", width, spec.channels)
        yield from modulation(f"{sound}adaln_single", f"{sound}time_embed", width, chunks)
        if spec.gated:
            yield from modulation(f"{sound}prompt_adaln_single", f"{sound}prompt_adaln", width, 2)
        else:
            yield from caption(f"{sound}caption_projection", width, spec.text)
    for name, path, width, count in (
        ("av_ca_video_scale_shift", "av_cross_attn_video_scale_shift", spec.video, 4),
        ("av_ca_audio_scale_shift", "av_cross_attn_audio_scale_shift", spec.audio, 4),
        ("av_ca_a2v_gate", "av_cross_attn_video_a2v_gate", spec.video, 1),
        ("av_ca_v2a_gate", "av_cross_attn_audio_v2a_gate", spec.audio, 1),
    ):
        yield from modulation(f"{name}_adaln_single", path, width, count)
    for index in range(spec.layers):
        yield from _block(f"transformer_blocks.{index}", spec)
    yield one("proj_out", "proj_out", spec.channels, spec.video)
    yield one("audio_proj_out", "audio_proj_out", spec.channels, spec.audio)


def _block(block: str, spec: Ltx2) -> Iterator[Row]:
    video, audio, gates = spec.video, spec.audio, spec.gates
    for sound, width in (("", video), ("audio_", audio)):
        yield from attention(f"{block}.{sound}attn1", width, width, width, gates)
        yield from attention(f"{block}.{sound}attn2", width, width, width, gates)
        yield from feed_forward(f"{block}.{sound}ff", width)
    yield from attention(f"{block}.audio_to_video_attn", video, audio, audio, gates)
    yield from attention(f"{block}.video_to_audio_attn", audio, video, audio, gates)


def connector_namings(spec: Ltx2) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, whose names are whole: only some are in the model's part."""
    namings = two_namings(_connector_rows(spec), "connectors")
    inside = "diffusion_model."
    keys = {name: f"model.{name}.weight" for name in namings["native"] if name.startswith(inside)}
    return {**namings, "native": Naming(namings["native"], keys)}


def _connector_rows(spec: Ltx2) -> Iterator[Row]:
    size, name = spec.text * spec.text_layers, "text_embedding_projection"
    if spec.gated:
        yield one(f"{name}.video_aggregate_embed", "video_text_proj_in", spec.video, size)
        yield one(f"{name}.audio_aggregate_embed", "audio_text_proj_in", spec.audio, size)
    else:
        yield one(f"{name}.aggregate_embed", "text_proj_in", spec.text, size)
    for kind, width in (("video", spec.video_connector), ("audio", spec.audio_connector)):
        gates = spec.gates if spec.gated else 0
        for index in range(spec.connector_layers):
            block = f"diffusion_model.{kind}_embeddings_connector.transformer_1d_blocks.{index}"
            path = f"{kind}_connector.transformer_blocks.{index}"
            yield from attention(f"{block}.attn1", width, width, width, gates, f"{path}.attn1")
            yield from feed_forward(f"{block}.ff", width, f"{path}.ff")


_NUMBERED = numbered("B", 0, LTX_2_0.layers - 1)
_EVERY = ("TEXT", "IN", *_NUMBERED, "OUT")

BLOCKS = Blocks(
    labels=_EVERY,
    spans=(
        Span("connectors", "native", "", "TEXT"),
        Span("transformer", "native", "transformer_blocks.", "B{}"),
        Span("transformer", "native", "proj_out", "OUT"),
        Span("transformer", "native", "audio_proj_out", "OUT"),
        Span("transformer", "native", "", "IN"),
    ),
    lists=(_NUMBERED, _EVERY),
)

ARCHITECTURE = Architecture(
    id="ltx2",
    title="LTX-2",
    components={
        "transformer": partial(transformer_namings, LTX_2_0),
        "connectors": partial(connector_namings, LTX_2_0),
    },
    outlines={"transformer": partial(transformer_namings, LTX_2_0._replace(layers=1))},
    writes={
        "kohya": {"transformer": Voice("lora_unet_", "native")},
        "diffusers": {
            "transformer": Voice("transformer.", "diffusers"),
            "connectors": Voice("connectors.", "diffusers"),
        },
        "comfyui": {"transformer": Voice("diffusion_model.", "native"), "connectors": Voice("", "native")},
        "peft": {
            "transformer": Voice("base_model.model.", "diffusers"),
            "connectors": Voice("base_model.model.", "diffusers"),
        },
    },
    reads={
        "kohya": {"transformer": (Voice("lora_unet_", "diffusers"), Voice("lycoris_", "diffusers"))},
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (
                Voice("diffusion_model.", "diffusers"),
                Voice("model.diffusion_model.", "native"),
            ),
            "connectors": (Voice("diffusion_model.", "native"),),
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "native"),
                Voice("base_model.model.transformer.", "diffusers"),
            )
        },
    },
    checkpoints=(
        Checkpoint(
            "native",
            {"transformer": Voice("model.diffusion_model.", "native"), "connectors": Voice("", "native")},
        ),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers"), "connectors": Voice("", "diffusers")}),
    ),
    blocks=BLOCKS,
    variants=(
        Variant(
            "LTX-2.3",
            components={
                "transformer": partial(transformer_namings, LTX_2_3),
                "connectors": partial(connector_namings, LTX_2_3),
            },
            blocks=BLOCKS._replace(),  # of its own: the connectors have more blocks
            outlines={"transformer": partial(transformer_namings, LTX_2_3._replace(layers=1))},
        ),
    ),
    # What LTX-Video 13B has is also here, of the same size: a file without a module for sound is for that one.
    kin="ltx-video",
)
