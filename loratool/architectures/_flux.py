"""The transformer of FLUX.1 and of Chroma, which was made from it: BFL's names, diffusers', and OneTrainer's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.core.naming import Naming
from loratool.core.target import Target

COMPONENT = "transformer"

Row = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]
"""(BFL name, its parts in row order: (diffusers path, shape))."""


class FluxTransformer(NamedTuple):
    """The sizes of a Flux transformer. `guidance` is False for schnell, which has no guidance embedder.

    `inputs` are the channels that go in, if more than come out: Fill and the control models take an image, too.
    `approximator` is the width of the network that makes all modulations in Chroma, 0 where every block has its own.
    """

    double: int = 19
    single: int = 38
    width: int = 3072
    head: int = 128
    mlp_ratio: int = 4
    channels: int = 64
    inputs: int = 0
    context: int = 4096
    pooled: int = 768
    time: int = 256
    guidance: bool = True
    approximator: int = 0


class _Tables:
    def __init__(self) -> None:
        self.diffusers: dict[str, tuple[Target, ...]] = {}
        self.bfl: dict[str, tuple[Target, ...]] = {}
        self.omi: dict[str, tuple[Target, ...]] = {}
        self.xlabs: dict[str, tuple[Target, ...]] = {}
        self.tensor_keys: dict[str, str] = {}


def transformer_namings(spec: FluxTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical), `bfl` (q, k, v and the MLP fused) and `omi`.

    `omi` is OneTrainer's: BFL's names, but fused weights in numbered parts (`img_attn.qkv.0`).
    """
    tables = _Tables()
    for name, parts in _rows(spec):
        targets = tuple(Target(COMPONENT, path, shape) for path, shape in parts)
        tables.bfl[name] = targets
        tables.xlabs |= _xlabs_names(name, targets)
        if len(targets[0].shape) == 1:
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


def _omi_name(name: str, index: int, parts: int) -> str:
    if name == "img_in":
        return "img_in.proj"
    return name if parts == 1 else f"{name}.{index}"


def _rows(spec: FluxTransformer) -> Iterator[Row]:
    width = spec.width
    yield "img_in", (("x_embedder", (width, spec.inputs or spec.channels)),)
    yield "txt_in", (("context_embedder", (width, spec.context)),)
    if spec.approximator:
        yield from _approximator("distilled_guidance_layer", spec)
    else:
        yield from _embedder("time_in", "timestep_embedder", width, spec.time)
        yield from _embedder("vector_in", "text_embedder", width, spec.pooled)
    if spec.guidance:
        yield from _embedder("guidance_in", "guidance_embedder", width, spec.time)
    for index in range(spec.double):
        yield from _double_block(index, spec)
    for index in range(spec.single):
        yield from _single_block(index, spec)
    if not spec.approximator:
        shift, scale = ((f"norm_out.linear:{part}", (width, width)) for part in ("shift", "scale"))
        yield "final_layer.adaLN_modulation.1", (shift, scale)
    yield "final_layer.linear", (("proj_out", (spec.channels, width)),)


def _embedder(name: str, embedder: str, width: int, size: int) -> Iterator[Row]:
    yield f"{name}.in_layer", ((f"time_text_embed.{embedder}.linear_1", (width, size)),)
    yield f"{name}.out_layer", ((f"time_text_embed.{embedder}.linear_2", (width, width)),)


def _approximator(name: str, spec: FluxTransformer) -> Iterator[Row]:
    width = spec.approximator
    yield f"{name}.in_proj", ((f"{name}.in_proj", (width, 64)),)
    for index in range(5):
        layer = f"{name}.layers.{index}"
        yield f"{layer}.in_layer", ((f"{layer}.linear_1", (width, width)),)
        yield f"{layer}.out_layer", ((f"{layer}.linear_2", (width, width)),)
        yield f"{name}.norms.{index}", ((f"{name}.norms.{index}", (width,)),)
    yield f"{name}.out_proj", ((f"{name}.out_proj", (spec.width, width)),)


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
        if not spec.approximator:
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
    if not spec.approximator:
        yield f"{name}.modulation.lin", ((f"{path}.norm.linear", (3 * width, width)),)
    yield f"{name}.linear1", (*qkv, (f"{path}.proj_mlp", (mlp, width)))
    yield f"{name}.norm.query_norm", ((f"{path}.attn.norm_q", (spec.head,)),)
    yield f"{name}.norm.key_norm", ((f"{path}.attn.norm_k", (spec.head,)),)
    # Its input is attention and MLP side by side, in the same order in both namings: no cut.
    yield f"{name}.linear2", ((f"{path}.proj_out", (width, width + mlp)),)
