"""A checkpoint as a table: its tensor names and shapes are the targets of a model that has no table of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from loratool.core.architecture import Architecture, Namings, Voice
from loratool.core.errors import FormatError, LoratoolError
from loratool.core.identify import checkpoint_of
from loratool.core.naming import Naming
from loratool.core.target import Target
from loratool.files.safetensors import read_header

_WRAPPERS = ("model.diffusion_model.", "diffusion_model.")
_WEIGHT = ".weight"

Shapes = Mapping[str, tuple[int, ...]]


def architecture_of(path: str | os.PathLike[str]) -> Architecture:
    """The architecture whose targets are the weights of the checkpoint at `path`: a file, or a folder with shards or
    with one sub-folder per component. Reads headers only. A model with a table of its own gives that table.

    Raises FormatError if there are no safetensors weights.
    """
    place = Path(path)
    try:
        shapes = _shapes(place)
    except LoratoolError as error:
        raise error.with_file(str(path)) from error.__cause__
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=str(path)) from error
    known = checkpoint_of({key: None for part in shapes.values() for key in part})
    if known is not None:
        return known
    components: dict[str, Callable[[], Namings]] = {}
    for component, found in shapes.items():
        naming = _naming(component, found)
        components[component] = _maker(naming)
    return Architecture(
        id="generic",
        title=f"the model in {place.name}",
        components=components,
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
    )


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


def _shapes(place: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """component -> key -> shape."""
    if place.is_file():
        return {_component(keys): keys} if (keys := _header(place)) else {}
    if not place.exists():
        raise FormatError("does not exist")
    parts = {sub.name: sub for sub in sorted(place.iterdir()) if sub.is_dir() and any(sub.glob("*.safetensors"))}
    if any(place.glob("*.safetensors")):
        parts = {"": place}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, folder in parts.items():
        merged: dict[str, tuple[int, ...]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            merged |= _header(file)
        found[name or _component(merged)] = merged
    if not found:
        raise FormatError("holds no safetensors weights", hint="name a checkpoint file or a model's folder")
    return found


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in read_header(file).tensors.items()}


def _component(keys: Shapes) -> str:
    return "transformer" if any(key.startswith(_WRAPPERS) for key in keys) else "model"


def _naming(component: str, keys: Shapes) -> Naming:
    wrapper = next((w for w in _WRAPPERS if any(key.startswith(w) for key in keys)), "")
    table = {}
    for key, shape in keys.items():
        if key.startswith(wrapper) and key.endswith(_WEIGHT) and shape:
            name = key[len(wrapper) : -len(_WEIGHT)]
            table[name] = (Target(component, name, shape),)
    if not table:
        raise FormatError("holds no weights", hint="name a checkpoint")
    return Naming(table)
