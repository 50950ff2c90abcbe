"""A checkpoint as a table: its tensor names and shapes are the targets of a model that has no table of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratool.core.architecture import Architecture, Checkpoint, Namings, Voice
from loratool.core.errors import FormatError
from loratool.core.identify import checkpoint_of
from loratool.core.naming import Naming
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import CheckpointFiles, read_checkpoint

_WRAPPERS = ("model.diffusion_model.", "diffusion_model.")
_WEIGHT = ".weight"
MODEL_CONFIG, MAX_CONFIG = "config.json", 16 << 20
"""A transformers model's own config, and how large (bytes) it may be to be read."""

BACKBONES = ("transformer", "unet", "prior")
"""Sub-folders with the part of a pipeline that is its own."""

Tensors = Mapping[str, LazyTensor]


def architecture_of(path: str | os.PathLike[str]) -> Architecture:
    """The architecture whose targets are the weights of the checkpoint at `path`: a file, or a folder with shards or
    with one sub-folder per component. Reads headers only. A model with a table of its own gives that table.

    Raises FormatError if there are no safetensors weights.
    """
    return model_of(read_checkpoint(path))


def model_of(checkpoint: CheckpointFiles) -> Architecture:
    """The architecture of a checkpoint that is open; see `architecture_of`."""
    known = known_model(checkpoint)
    if known is not None:
        return known
    components: dict[str, Callable[[], Namings]] = {}
    voices: dict[str, Voice] = {}
    for folder, tensors in checkpoint.components.items():
        component = folder or _component(tensors)
        wrapper = next((w for w in _WRAPPERS if any(key.startswith(w) for key in tensors)), "")
        naming = _naming(component, wrapper, tensors)
        if naming:
            voices[component] = Voice(wrapper, "base")
            components[component] = _maker(naming)
    if not components:
        raise FormatError("holds no weights", file=checkpoint.path, hint="name a checkpoint")
    return Architecture(
        id="generic",
        title=f"the model in {Path(checkpoint.path).name}",
        components=components,
        checkpoints=(Checkpoint("base", voices),),
        writes={
            "peft": {c: Voice("base_model.model.", "base") for c in components},
            "diffusers": {c: Voice("transformer." if c == "model" else f"{c}.", "base") for c in components},
            "comfyui": {c: Voice("diffusion_model.", "base") for c in components if not _is_encoder(c)},
            "kohya": {c: Voice(_kohya_prefix(c), "base") for c in components},
        },
        reads={
            "kohya": {c: tuple(Voice(p, "base") for p in _kohya_aliases(c)) for c in components},
            "diffusers": {c: (Voice("", "base"),) for c in components},
            "comfyui": {c: (Voice("", "base"), Voice("model.diffusion_model.", "base")) for c in components},
            "peft": {c: (Voice("", "base"),) for c in components},
        },
        config=_config(Path(checkpoint.path)),
    )


def _config(place: Path) -> Mapping[str, Any]:
    """The `config.json` of a model's folder; nothing where there is none that can be read."""
    file = place / MODEL_CONFIG
    if not file.is_file() or file.stat().st_size > MAX_CONFIG:
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    return config if isinstance(config, dict) else {}


def known_model(checkpoint: CheckpointFiles) -> Architecture | None:
    """The model with a table of its own that a checkpoint is of; None for any other."""
    return checkpoint_of(telling_part(checkpoint))


def telling_part(checkpoint: CheckpointFiles) -> Tensors:
    """The tensors that tell what model a checkpoint is of: in a folder those of its own part, else all.

    Text encoders are shared by many models, and components of a folder may have the same keys.
    """
    backbone = next((checkpoint.components[name] for name in BACKBONES if name in checkpoint.components), None)
    return checkpoint.keys if backbone is None else backbone


def _maker(naming: Naming) -> Callable[[], Namings]:
    return lambda: {"base": naming}


def _is_encoder(component: str) -> bool:
    return component.startswith("text_encoder")


def _kohya_prefix(component: str) -> str:
    if _is_encoder(component):
        number = component.rpartition("_")[2]
        return f"lora_te{number}_" if number.isdigit() else "lora_te_"
    return "lora_unet_"


def _kohya_aliases(component: str) -> tuple[str, ...]:
    if _is_encoder(component):
        return ("lora_te1_",) if component == "text_encoder" else ()
    return ("lycoris_", "lora_transformer_", "lora_unet__", "lora_te_", "lora_")


def _component(keys: Tensors) -> str:
    return "transformer" if any(key.startswith(_WRAPPERS) for key in keys) else "model"


def _naming(component: str, wrapper: str, tensors: Tensors) -> Naming:
    table = {}
    for key, tensor in tensors.items():
        if key.startswith(wrapper) and key.endswith(_WEIGHT) and tensor.shape:
            name = key[len(wrapper) : -len(_WEIGHT)]
            table[name] = (Target(component, name, tensor.shape),)
    return Naming(table)
