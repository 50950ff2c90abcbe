"""Adapters for tests: full-width, with the real names of the real models, spelled here and not by the code under test.

Names come from the architecture tables (which have tests of their own against the real model classes); prefixes,
suffixes, alpha's place and configs are written out below, as the programs write them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture
from loratool.core.registry import architectures
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import write_bundle
from loratool.files.safetensors import write_safetensors

ARCHITECTURES = ("sd15", "sdxl", "flux")
LAYOUTS = ("kohya", "diffusers", "peft", "comfyui")
"""The layouts that every test of all layouts goes through; `MORE` are those that follow from them."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}

# (prefix, naming) of each component, written out: what the programs write, not what the tables say.
PREFIXES: Mapping[tuple[str, str], Mapping[str, tuple[str, str]]] = {
    ("kohya", "sd15"): {"unet": ("lora_unet_", "diffusers"), "text_encoder": ("lora_te_", "hf")},
    ("kohya", "sdxl"): {
        "unet": ("lora_unet_", "ldm"),
        "text_encoder": ("lora_te1_", "hf"),
        "text_encoder_2": ("lora_te2_", "hf"),
    },
    ("kohya", "flux"): {
        "transformer": ("lora_unet_", "bfl"),
        "text_encoder": ("lora_te1_", "hf"),
        "text_encoder_2": ("lora_te3_", "hf"),
    },
    ("diffusers", "sd15"): {"unet": ("unet.", "diffusers"), "text_encoder": ("text_encoder.", "hf")},
    ("diffusers", "sdxl"): {
        "unet": ("unet.", "diffusers"),
        "text_encoder": ("text_encoder.", "hf"),
        "text_encoder_2": ("text_encoder_2.", "hf"),
    },
    ("diffusers", "flux"): {
        "transformer": ("transformer.", "diffusers"),
        "text_encoder": ("text_encoder.", "hf"),
        "text_encoder_2": ("text_encoder_2.", "hf"),
    },
    ("comfyui", "sd15"): {
        "unet": ("diffusion_model.", "ldm"),
        "text_encoder": ("text_encoders.clip_l.transformer.", "hf"),
    },
    ("comfyui", "sdxl"): {
        "unet": ("diffusion_model.", "ldm"),
        "text_encoder": ("text_encoders.clip_l.transformer.", "hf"),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", "hf"),
    },
    ("comfyui", "flux"): {
        "transformer": ("diffusion_model.", "bfl"),
        "text_encoder": ("text_encoders.clip_l.transformer.", "hf"),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.", "hf"),
    },
    ("peft", "sd15"): {c: ("base_model.model.", n) for c, n in (("unet", "diffusers"), ("text_encoder", "hf-short"))},
    ("peft", "sdxl"): {
        c: ("base_model.model.", n)
        for c, n in (("unet", "diffusers"), ("text_encoder", "hf-short"), ("text_encoder_2", "hf"))
    },
    ("peft", "flux"): {
        c: ("base_model.model.", n)
        for c, n in (("transformer", "diffusers"), ("text_encoder", "hf-short"), ("text_encoder_2", "hf"))
    },
}

MORE: Mapping[tuple[str, str], Mapping[str, tuple[str, str]]] = {
    ("onetrainer", "sd15"): {"unet": ("lora_unet_", "diffusers"), "text_encoder": ("lora_te_", "hf")},
    ("onetrainer", "sdxl"): {
        "unet": ("lora_unet_", "diffusers"),
        "text_encoder": ("lora_te1_", "hf"),
        "text_encoder_2": ("lora_te2_", "hf"),
    },
    ("onetrainer", "flux"): {
        "transformer": ("lora_transformer_", "diffusers"),
        "text_encoder": ("lora_te1_", "hf"),
        "text_encoder_2": ("lora_te2_", "hf"),
    },
    ("omi", "sd15"): {"unet": ("unet.", "ldm"), "text_encoder": ("clip_l.", "hf")},
    ("omi", "sdxl"): {"unet": ("unet.", "ldm"), "text_encoder": ("clip_l.", "hf"), "text_encoder_2": ("clip_g.", "hf")},
    ("omi", "flux"): {
        "transformer": ("transformer.", "omi"),
        "text_encoder": ("clip_l.", "hf"),
        "text_encoder_2": ("t5.", "hf"),
    },
    ("musubi", "flux"): {"transformer": ("lora_unet_", "bfl")},
    ("lycoris", "sd15"): {"unet": ("lycoris_", "diffusers")},
    ("lycoris", "sdxl"): {"unet": ("lycoris_", "diffusers")},
    ("lycoris", "flux"): {"transformer": ("lycoris_", "diffusers")},
    ("ai-toolkit", "flux"): {"transformer": ("transformer.", "diffusers")},
}
"""The same of the other layouts that are written."""

FLATTENED = frozenset({"kohya", "onetrainer", "musubi", "lycoris"})
BESIDE = FLATTENED | {"omi"}
"""Layouts with alpha beside the factors, always."""

_NO_LINEAR = re.compile(r"embedding|\bshared\b|relative_attention_bias")


@dataclass(frozen=True)
class Weight:
    """One weight that a layout has a name for: `name` in that layout's naming."""

    component: str
    prefix: str
    name: str
    targets: tuple[Target, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, kh, kw)."""
        return (sum(target.rows for target in self.targets), *self.targets[0].shape[1:])


@dataclass(frozen=True)
class Part:
    """One module to build: `alpha` None leaves it out."""

    weight: Weight
    rank: int = 4
    alpha: float | None = None
    dtype: str = "F32"
    zero_up: bool = False


@cache
def weights(architecture: str, layout: str) -> tuple[Weight, ...]:
    """Every Linear and Conv of a model under its name in a layout, in the tables' order."""
    table = architectures()[architecture]
    found = []
    for component, (prefix, naming) in {**PREFIXES, **MORE}[layout, architecture].items():
        for name, targets in table.naming(component, naming).items():
            if len(targets[0].shape) > 1 and not any(_NO_LINEAR.search(target.path) for target in targets):
                found.append(Weight(component, prefix, name, targets))
    return tuple(found)


def weight(architecture: str, layout: str, name: str) -> Weight:
    """The weight of that name; any component."""
    return next(one for one in weights(architecture, layout) if one.name == name)


def pair(shape: Sequence[int], rank: int, dtype: str, seed: int, zero_up: bool = False) -> dict[str, LazyTensor]:
    """Random `up` and `down` for a weight, of the spectrum of a trained file."""
    generator = torch.Generator().manual_seed(seed)
    kernel = tuple(shape[2:])
    up = torch.randn(shape[0], rank, generator=generator) * 0.05
    if zero_up:
        up.zero_()
    down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
    up = up.reshape(shape[0], rank, *(1,) * len(kernel))
    return {
        "up": LazyTensor.from_torch(up.to(DTYPES[dtype])),
        "down": LazyTensor.from_torch(down.to(DTYPES[dtype])),
    }


@dataclass(frozen=True)
class Style:
    """Habits of writers within one layout. `alpha_dtype` None: that of the factors; `alpha_shape` () or (1,)."""

    alpha_dtype: str | None = None
    alpha_shape: tuple[int, ...] = ()
    adapter_name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def build(parts: Sequence[Part], layout: str, style: Style | None = None, seed: int = 0) -> Bundle:
    """The bundle in which a program of that layout would keep these modules."""
    style = style or Style()
    tensors: dict[str, LazyTensor] = {}
    several = len({part.weight.component for part in parts}) > 1
    for index, part in enumerate(parts):
        factors = pair(part.weight.shape, part.rank, part.dtype, seed * 10007 + index, part.zero_up)
        tensors |= spelled(part, factors, layout, style, several)
    metadata = dict(style.metadata)
    sides: dict[str, str] = {}
    if layout in ("diffusers", "peft"):
        metadata["format"] = "pt"
    if layout == "diffusers" and any(part.alpha is not None for part in parts):
        metadata["lora_adapter_metadata"] = json.dumps(diffusers_config(parts), indent=2, sort_keys=True)
    if layout == "peft":
        for component in dict.fromkeys(part.weight.component for part in parts):
            own = [part for part in parts if part.weight.component == component]
            folder = f"{component}/" if several else ""
            sides[f"{folder}adapter_config.json"] = json.dumps(peft_config(own), indent=2, sort_keys=True)
    return Bundle(tensors, metadata, sides)


def spelled(
    part: Part, factors: Mapping[str, LazyTensor], layout: str, style: Style | None = None, several: bool = False
) -> dict[str, LazyTensor]:
    """Keys and tensors of one module."""
    style = style or Style()
    one = part.weight
    if layout in BESIDE:
        stem = one.prefix + (one.name.replace(".", "_") if layout in FLATTENED else one.name)
        keys = {stem + ".lora_up.weight": factors["up"], stem + ".lora_down.weight": factors["down"]}
    else:
        folder = f"{one.component}/" if layout == "peft" and several else ""
        stem = f"{folder}{one.prefix}{one.name}"
        name = f".{style.adapter_name}" if style.adapter_name else ""
        keys = {f"{stem}.lora_B{name}.weight": factors["up"], f"{stem}.lora_A{name}.weight": factors["down"]}
    beside = layout in BESIDE or (layout == "comfyui" and part.alpha != part.rank)
    if beside and part.alpha is not None:
        scalar = LazyTensor.scalar(part.alpha, style.alpha_dtype or part.dtype)
        keys[stem + ".alpha"] = scalar.reshape(style.alpha_shape)
    return keys


def peft_config(parts: Sequence[Part]) -> dict[str, Any]:
    """What a user who writes every rank and alpha down would have in `adapter_config.json`."""
    names = [part.weight.name for part in parts]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": parts[0].rank,
        "lora_alpha": parts[0].rank if parts[0].alpha is None else parts[0].alpha,
        "rank_pattern": {f"^{re.escape(part.weight.name)}": part.rank for part in parts},
        "alpha_pattern": {
            f"^{re.escape(part.weight.name)}": part.rank if part.alpha is None else part.alpha for part in parts
        },
        "target_modules": names,
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "peft_version": "0.17.0",
    }


def diffusers_config(parts: Sequence[Part]) -> dict[str, Any]:
    """The `lora_adapter_metadata` of diffusers: the fields of each component's LoraConfig behind its name."""
    whole = {}
    for component in dict.fromkeys(part.weight.component for part in parts):
        config = peft_config([part for part in parts if part.weight.component == component])
        if component.startswith("text_encoder"):
            for field_name in ("rank_pattern", "alpha_pattern"):
                config[field_name] = {
                    key.replace(r"^text_model\.", ""): value for key, value in config[field_name].items()
                }
        whole |= {f"{component}.{name}": value for name, value in config.items()}
    return whole


def random_parts(
    rng: random.Random,
    architecture: str,
    layout: str,
    count: int = 8,
    ranks: Sequence[int] = (1, 2, 4, 8),
    alphas: Sequence[float | None] = (1.0, 2.0, 4.0, 16.0),
    dtype: str = "F32",
) -> list[Part]:
    """A random subset of a model's weights with random ranks and alphas; neighbours often, so that fused weights are
    met whole and in part."""
    table = weights(architecture, layout)
    chosen: dict[int, Weight] = {}
    while len(chosen) < count:
        start = rng.randrange(len(table))
        for index in range(start, min(start + rng.choice((1, 3, 4)), len(table))):
            chosen[index] = table[index]
    return [Part(one, rng.choice(ranks), rng.choice(alphas), dtype) for _, one in sorted(chosen.items())][:count]


def typical_parts(
    architecture: str, layout: str, rank: int = 4, alpha: float | None = 4.0, dtype: str = "F16"
) -> list[Part]:
    """Some modules of every component and kind: enough of them for a file to be recognised."""
    table = weights(architecture, layout)
    step = max(1, len(table) // 40)
    return [Part(one, rank, alpha, dtype) for one in table[::step]]


def write_file(path: Path, bundle: Bundle) -> Path:
    """Writes a bundle as one safetensors file, or as a PEFT folder where it has side files."""
    if bundle.side_files:
        write_bundle(path, bundle, folder=True, overwrite=True)
    else:
        write_safetensors(path, bundle.tensors, bundle.metadata)
    return path


def zero_file(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: str = "BF16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A file of these keys and shapes whose data are a hole in the file: any size, no disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    size = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    end = 0
    for key in sorted(shapes):
        count = size
        for dimension in shapes[key]:
            count *= dimension
        header[key] = {"dtype": dtype, "shape": list(shapes[key]), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def contents(bundle: Bundle) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """key -> dtype, shape and bytes."""
    return {key: (t.dtype, t.shape, bytes(t.read())) for key, t in bundle.tensors.items()}


def architecture_of(identifier: str) -> Architecture:
    """The table of that id."""
    return architectures()[identifier]


def shuffled(bundle: Bundle, rng: random.Random) -> Bundle:
    """The same bundle with its keys in another order."""
    keys = list(bundle.tensors)
    rng.shuffle(keys)
    return Bundle({key: bundle.tensors[key] for key in keys}, bundle.metadata, bundle.side_files)


def only(bundle: Bundle, keep: Callable[[str], bool]) -> Bundle:
    """The bundle with only those keys."""
    return Bundle({k: t for k, t in bundle.tensors.items() if keep(k)}, bundle.metadata, bundle.side_files)
