"""AuraFlow, and what was made of it (Pony V7): the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import Row, dit_blocks, dit_namings, dit_voices, row, swapped
from loratool.core.architecture import Architecture
from loratool.core.naming import Naming


class AuraFlowTransformer(NamedTuple):
    """The sizes of the transformer."""

    double: int = 4
    single: int = 32
    width: int = 3072
    mlp: int = 8192
    channels: int = 4
    context: int = 2048
    time: int = 256


_OUT = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_ADDED = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}
_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}


def _rows(spec: AuraFlowTransformer) -> Iterator[Row]:
    width, patch = spec.width, 4 * spec.channels
    yield row("init_x_linear", "pos_embed.proj", width, patch)
    yield row("cond_seq_linear", "context_embedder", width, spec.context)
    yield row("t_embedder.mlp.0", "time_step_proj.linear_1", width, spec.time)
    yield row("t_embedder.mlp.2", "time_step_proj.linear_2", width, width)
    for index in range(spec.double):
        name, path = f"double_layers.{index}", f"joint_transformer_blocks.{index}"
        # X is the image, C the text; attention numbers them 2 and 1.
        for letter, number, norm, attention, feed_forward in (
            ("X", 2, "norm1", _OUT, "ff"),
            ("C", 1, "norm1_context", _ADDED, "ff_context"),
        ):
            yield row(f"{name}.mod{letter}.1", f"{path}.{norm}.linear", 6 * width, width)
            yield from _attention(f"{name}.attn.w{number}", f"{path}.attn", attention, width)
            yield from _mlp(f"{name}.mlp{letter}", f"{path}.{feed_forward}", spec)
    for index in range(spec.single):
        name, path = f"single_layers.{index}", f"single_transformer_blocks.{index}"
        yield row(f"{name}.modCX.1", f"{path}.norm1.linear", 6 * width, width)
        yield from _attention(f"{name}.attn.w1", f"{path}.attn", _OUT, width)
        yield from _mlp(f"{name}.mlp", f"{path}.ff", spec)
    yield swapped("modF.1", "norm_out.linear", width, width)
    yield row("final_linear", "proj_out", patch, width)


def _attention(name: str, path: str, parts: dict[str, str], width: int) -> Iterator[Row]:
    for letter, part in parts.items():
        yield row(f"{name}{letter}", f"{path}.{part}", width, width)


def _mlp(name: str, path: str, spec: AuraFlowTransformer) -> Iterator[Row]:
    for native, part in _MLP.items():
        shape = (spec.width, spec.mlp) if native == "c_proj" else (spec.mlp, spec.width)
        yield row(f"{name}.{native}", f"{path}.{part}", *shape)


def transformer_namings(spec: AuraFlowTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`."""
    return dit_namings(_rows(spec))


def _transformer() -> dict[str, Naming]:
    return transformer_namings(AuraFlowTransformer())


VOICES = dit_voices("native")

ARCHITECTURE = Architecture(
    id="auraflow",
    title="AuraFlow",
    components={"transformer": _transformer},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={"transformer": partial(transformer_namings, AuraFlowTransformer(double=1, single=1))},
    blocks=dit_blocks(
        {"joint_transformer_blocks.": ("D", 4), "single_transformer_blocks.": ("S", 32)}, ("norm_out.", "proj_out")
    ),
)
