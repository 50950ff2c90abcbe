"""CLIP's text model: the transformers names, with and without their prefix, and OpenCLIP's."""

from __future__ import annotations

from typing import NamedTuple

from loratool.core.naming import Naming
from loratool.core.target import Target

_PREFIX = "text_model."


class ClipText(NamedTuple):
    """What tells one CLIP text model from another. `projection` is the width of its projection (0: it has none)."""

    layers: int
    width: int
    mlp: int
    projection: int = 0
    vocabulary: int = 49408
    positions: int = 77


CLIP_L = ClipText(layers=12, width=768, mlp=3072)
"""OpenAI's ViT-L/14, the text encoder of Stable Diffusion 1 and the first one of SDXL, SD3 and Flux."""

CLIP_G = ClipText(layers=32, width=1280, mlp=5120, projection=1280)
"""OpenCLIP's ViT-bigG-14, the second text encoder of SDXL and SD3."""


def clip_l_namings() -> dict[str, Naming]:
    """CLIP-L as the component `text_encoder`: one function, so that all models with it share one table."""
    return clip_namings(CLIP_L, "text_encoder")


def clip_l_outline() -> dict[str, Naming]:
    """The outline of `clip_l_namings`, shared as they are."""
    return clip_namings(CLIP_L._replace(layers=1), "text_encoder")


def clip_namings(spec: ClipText, component: str) -> dict[str, Naming]:
    """The namings `hf` (canonical) and `hf-short`.

    transformers 5.6 dropped the leading `text_model.` from CLIPTextModel, though not from
    CLIPTextModelWithProjection; files of both kinds exist for both, hence `hf-short`.
    """
    hf = {path: (Target(component, path, shape),) for path, shape in _shapes(spec).items()}
    return {
        "hf": Naming(hf),
        "hf-short": Naming({path.removeprefix(_PREFIX): targets for path, targets in hf.items()}),
    }


def open_clip_namings(spec: ClipText, component: str) -> dict[str, Naming]:
    """The namings of `clip_namings` and `openclip`, which fuses q, k, v."""
    namings = clip_namings(spec, component)
    return {**namings, "openclip": _open_clip(spec, namings["hf"])}


def _shapes(spec: ClipText) -> dict[str, tuple[int, ...]]:
    width = spec.width
    shapes: dict[str, tuple[int, ...]] = {
        f"{_PREFIX}embeddings.token_embedding": (spec.vocabulary, width),
        f"{_PREFIX}embeddings.position_embedding": (spec.positions, width),
    }
    for index in range(spec.layers):
        layer = f"{_PREFIX}encoder.layers.{index}"
        shapes[f"{layer}.layer_norm1"] = (width,)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{projection}"] = (width, width)
        shapes[f"{layer}.layer_norm2"] = (width,)
        shapes[f"{layer}.mlp.fc1"] = (spec.mlp, width)
        shapes[f"{layer}.mlp.fc2"] = (width, spec.mlp)
    shapes[f"{_PREFIX}final_layer_norm"] = (width,)
    if spec.projection:
        shapes["text_projection"] = (spec.projection, width)
    return shapes


def _open_clip(spec: ClipText, hf: Naming) -> Naming:
    table = {
        "token_embedding": hf[f"{_PREFIX}embeddings.token_embedding"],
        "positional_embedding": hf[f"{_PREFIX}embeddings.position_embedding"],
    }
    # OpenCLIP keeps these as bare parameters, not as modules with a `.weight`.
    tensor_keys = {"positional_embedding": "positional_embedding"}
    for index in range(spec.layers):
        layer, block = f"{_PREFIX}encoder.layers.{index}", f"transformer.resblocks.{index}"
        table[f"{block}.ln_1"] = hf[f"{layer}.layer_norm1"]
        table[f"{block}.attn.in_proj"] = tuple(hf[f"{layer}.self_attn.{part}_proj"][0] for part in "qkv")
        tensor_keys[f"{block}.attn.in_proj"] = f"{block}.attn.in_proj_weight"
        table[f"{block}.attn.out_proj"] = hf[f"{layer}.self_attn.out_proj"]
        table[f"{block}.ln_2"] = hf[f"{layer}.layer_norm2"]
        table[f"{block}.mlp.c_fc"] = hf[f"{layer}.mlp.fc1"]
        table[f"{block}.mlp.c_proj"] = hf[f"{layer}.mlp.fc2"]
    table["ln_final"] = hf[f"{_PREFIX}final_layer_norm"]
    if not spec.projection:
        return Naming(table, tensor_keys)
    table["text_projection"] = hf["text_projection"]
    tensor_keys["text_projection"] = "text_projection"
    # OpenCLIP multiplies from the left (`x @ text_projection`): its parameter is stored as (in, out).
    return Naming(table, tensor_keys, transposed=frozenset({"text_projection"}))
