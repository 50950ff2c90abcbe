"""FLUX.2: dev, klein 9B and klein 4B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import Row, dit_blocks, dit_namings, dit_voices, fused, row, swapped
from loratool.core.architecture import Architecture, Namings, Variant
from loratool.core.blocks import Blocks
from loratool.core.naming import Naming

HEAD = 128


class Flux2Transformer(NamedTuple):
    """The sizes of a FLUX.2 transformer."""

    double: int
    single: int
    width: int
    context: int
    guidance: bool = False
    mlp_ratio: int = 3
    channels: int = 128
    time: int = 256


DEV = Flux2Transformer(double=8, single=48, width=6144, context=15360, guidance=True)
KLEIN_9B = Flux2Transformer(double=8, single=24, width=4096, context=12288)
KLEIN_4B = Flux2Transformer(double=5, single=20, width=3072, context=7680)

_STREAMS = (
    # BFL's stream, then diffusers': (q, k, v), output, query norm, key norm, feed-forward.
    ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm_q", "norm_k", "ff"),
    ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_q", "norm_added_k", "ff_context"),
)


def _rows(spec: Flux2Transformer) -> Iterator[Row]:
    width, embedders = spec.width, "time_guidance_embed"
    yield row("img_in", "x_embedder", width, spec.channels)
    yield row("txt_in", "context_embedder", width, spec.context)
    for name, embedder in (("time", "timestep"), ("guidance", "guidance"))[: 1 + spec.guidance]:
        yield row(f"{name}_in.in_layer", f"{embedders}.{embedder}_embedder.linear_1", width, spec.time)
        yield row(f"{name}_in.out_layer", f"{embedders}.{embedder}_embedder.linear_2", width, width)
    for name, parts in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
        yield row(f"{name}.lin", f"{name}.linear", parts * width, width)
    yield row("single_stream_modulation.lin", "single_stream_modulation.linear", 3 * width, width)
    for index in range(spec.double):
        yield from _double_block(index, spec)
    for index in range(spec.single):
        yield from _single_block(index, spec)
    yield swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width, width)
    yield row("final_layer.linear", "proj_out", spec.channels, width)


def _double_block(index: int, spec: Flux2Transformer) -> Iterator[Row]:
    name, path = f"double_blocks.{index}", f"transformer_blocks.{index}"
    width, mlp = spec.width, spec.width * spec.mlp_ratio
    for stream, qkv, out, query_norm, key_norm, feed_forward in _STREAMS:
        attention = f"{name}.{stream}_attn"
        yield fused(f"{attention}.qkv", (f"{path}.attn.{part}" for part in qkv), width, width)
        yield _norm(f"{attention}.norm.query_norm", f"{path}.attn.{query_norm}")
        yield _norm(f"{attention}.norm.key_norm", f"{path}.attn.{key_norm}")
        yield row(f"{attention}.proj", f"{path}.attn.{out}", width, width)
        # Values and gates of a SwiGLU, in one weight in both namings.
        yield row(f"{name}.{stream}_mlp.0", f"{path}.{feed_forward}.linear_in", 2 * mlp, width)
        yield row(f"{name}.{stream}_mlp.2", f"{path}.{feed_forward}.linear_out", width, mlp)


def _single_block(index: int, spec: Flux2Transformer) -> Iterator[Row]:
    """Attention and MLP side by side, fused in both namings: no cut."""
    name, path = f"single_blocks.{index}", f"single_transformer_blocks.{index}.attn"
    width, mlp = spec.width, spec.width * spec.mlp_ratio
    yield row(f"{name}.linear1", f"{path}.to_qkv_mlp_proj", 3 * width + 2 * mlp, width)
    yield _norm(f"{name}.norm.query_norm", f"{path}.norm_q")
    yield _norm(f"{name}.norm.key_norm", f"{path}.norm_k")
    yield row(f"{name}.linear2", f"{path}.to_out", width, width + mlp)


def _norm(name: str, path: str) -> Row:
    return row(name, path, HEAD)._replace(key=f"{name}.scale")


def transformer_namings(spec: Flux2Transformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native` (BFL's: q, k, v fused in the double blocks)."""
    return dit_namings(_rows(spec))


def _transformer(spec: Flux2Transformer) -> Callable[[], Namings]:
    return partial(transformer_namings, spec)


def _blocks(spec: Flux2Transformer) -> Blocks:
    series = {"transformer_blocks.": ("D", spec.double), "single_transformer_blocks.": ("S", spec.single)}
    return dit_blocks(series, ("norm_out.", "proj_out"))


def _klein(title: str, spec: Flux2Transformer, name: str) -> Variant:
    facts = {
        "modelspec.architecture": f"Flux.2-{name.replace('_', '-')}/lora",
        "ss_base_model_version": f"flux_2_{name}",
    }
    outlines = {"transformer": _transformer(spec._replace(double=1, single=1))}
    return Variant(title, {"transformer": _transformer(spec)}, facts, _blocks(spec), outlines)


VOICES = dit_voices("native")

ARCHITECTURE = Architecture(
    id="flux2",
    title="FLUX.2 dev",
    components={"transformer": _transformer(DEV)},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={"transformer": _transformer(DEV._replace(double=1, single=1))},
    facts={
        "ss_network_module": "networks.lora_flux_2",
        "ss_base_model_version": "flux_2_dev",
        "modelspec.architecture": "Flux.2-dev/lora",
    },
    blocks=_blocks(DEV),
    kin="flux",
    variants=(
        _klein("FLUX.2 klein 9B", KLEIN_9B, "klein_9b"),
        _klein("FLUX.2 klein 4B", KLEIN_4B, "klein_4b"),
    ),
)
