"""diffusers: `unet.` / `transformer.` / `text_encoder.` in front of module paths, `lora_A` / `lora_B` behind.

Alpha lives in the header entry `lora_adapter_metadata`, a JSON of LoraConfig fields with the component in front;
without it diffusers takes the rank for alpha. Old spellings (`.lora.up.weight`, `attn1.processor.to_q_lora.up.weight`,
`.lora_linear_layer.up.weight`) and `.alpha` beside the factors are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.core.adapter import PEFT_METADATA, Adapter, Bundle
from loratool.core.architecture import Voice
from loratool.core.layout import ALPHA, ANY, MAGNITUDE, Layout
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor
from loratool.layouts._peft_config import (
    all_paths,
    alphas,
    config_of,
    json_object,
    path_of,
    peft_magnitude,
    peft_obstacle,
    without_adapter_name,
)

_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_[qkv]|to_out|add_[kqv]_proj|to_add_out)_lora\.(up|down)\.weight$")
_OF_ENCODERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_WRAPPER = ".base_model.model."
_NORMS = (".norm_q", ".norm_k", ".norm_added_q", ".norm_added_k")
"""The norms whose whole weight diffusers takes from a control LoRA."""

_RANKED_IN_ENCODERS = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
_TODAY = {"up": "lora_B", "down": "lora_A"}


class Diffusers(Layout):
    """The diffusers file."""

    def rewrite(self, key: str) -> str:
        """Attention processors of 2023 into module paths; no PEFT wrapper (`transformer.base_model.model.`) and no
        leftover adapter name."""
        key = key.replace(_WRAPPER, ".", 1)
        match = _PROCESSOR.search(key)
        if match is None:
            return without_adapter_name(key)
        path = "to_out.0" if match[1] == "to_out" else match[1]
        if ".self_attn" in key:
            path = _OF_ENCODERS.get(match[1], path)
        return f"{key[: match.start()]}.{path}.{_TODAY[match[2]]}.weight"

    def split(self, key: str) -> tuple[str, str, str] | None:
        """A whole weight is a control LoRA's only where it is an attention norm's."""
        parts = super().split(key)
        return None if parts is not None and parts[1] == "set" and not parts[0].endswith(_NORMS) else parts

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """Alphas from the header, where there is none beside the factors."""
        text = adapter.metadata.get(PEFT_METADATA)
        if text is None:
            return adapter
        whole = json_object(text, PEFT_METADATA)
        modules = list(adapter.modules)
        for component in adapter.components:
            config = {key.partition(".")[2]: v for key, v in whole.items() if key.startswith(f"{component}.")}
            at = [i for i, m in enumerate(modules) if m.component == component and m.alpha is None]
            named = [(_short(path_of(modules[i], adapter.architecture, adapter.voices)), modules[i]) for i in at]
            for i, alpha in zip(at, alphas(config, named), strict=True):
                modules[i] = replace(modules[i], alpha=alpha)
        return replace(adapter, modules=tuple(modules))

    def obstacle(self, module: Module) -> str | None:
        """diffusers' magnitude is PEFT's: per output feature. Of whole weights it loads those of norms."""
        if module.family.id == "set" and not module.targets[0].path.endswith(_NORMS):
            return f"{self.id} replaces the weights of attention norms only"
        return peft_obstacle(module, self.id) or super().obstacle(module)

    def stored_magnitude(self, module: Module) -> LazyTensor:
        """As PEFT."""
        return peft_magnitude(module)

    def alpha_tensor(self, module: Module) -> LazyTensor | None:
        """Never beside the factors: diffusers would apply it to some models and ignore it for others."""
        return None

    def finish(self, adapter: Adapter, bundle: Bundle, voices: Mapping[str, Voice]) -> Bundle:
        """With the header entry for all components, wherever diffusers would guess wrong without it."""
        metadata = {**bundle.metadata, "format": "pt"}
        metadata.pop(PEFT_METADATA, None)
        whole: dict[str, Any] = {}
        told = True
        for component in adapter.components:
            pairs = [module for module in adapter.of(component) if module.family.id == "lora"]
            if not pairs:
                continue
            modules = [(_short(path_of(m, adapter.architecture, voices)), m) for m in pairs]
            known = all_paths(adapter.architecture, component, voices)
            others = None if known is None else frozenset(map(_short, known))
            # An encoder's `text_model.` comes and goes between versions of transformers: its names are left open at
            # the front, so that they match either way.
            config = config_of(modules, others, anchor=not component.startswith("text_encoder"))
            whole |= {f"{component}.{field}": value for field, value in config.items()}
            told = told and _told_by_keys(config, pairs)
        if not told:
            metadata[PEFT_METADATA] = json.dumps(whole, indent=2, sort_keys=True)
        return Bundle(bundle.tensors, metadata)


def _told_by_keys(config: Mapping[str, Any], modules: Sequence[Module]) -> bool:
    """Whether diffusers makes this config of the keys and shapes alone: one rank, scale 1, nothing special.

    It lists the modules by name and, in an encoder, takes the rank from those that have one of these ends.
    """
    plain = all(m.scale == 1.0 and m.magnitude is None and "bias" not in m.factors for m in modules)
    listed = isinstance(config["target_modules"], list)
    ranked = not modules[0].component.startswith("text_encoder") or any(
        m.targets[0].path.endswith(_RANKED_IN_ENCODERS) for m in modules
    )
    return plain and listed and ranked and not config["rank_pattern"]


def _short(path: str) -> str:
    return path.removeprefix("text_model.")


LAYOUT = Diffusers(
    id="diffusers",
    title="diffusers",
    separator=".",
    spelling={
        ("lora", "down"): ".lora_A.weight",
        ("lora", "up"): ".lora_B.weight",
        ("lora", "bias"): ".lora_B.bias",
        ("lora", "embedding_A"): ".lora_embedding_A",
        ("lora", "embedding_B"): ".lora_embedding_B",
        ("set", "weight"): ".weight",  # of attention norms, in control LoRAs
        (ANY, ALPHA): ".alpha",
        # With `.weight`: PEFT takes both, but transformers (5.23), which loads the encoders, only this.
        (ANY, MAGNITUDE): ".lora_magnitude_vector.weight",
    },
    aliases={
        ".lora.down.weight": ("lora", "down"),
        ".lora.up.weight": ("lora", "up"),
        ".lora_linear_layer.down.weight": ("lora", "down"),
        ".lora_linear_layer.up.weight": ("lora", "up"),
        ".lora_down.weight": ("lora", "down"),
        ".lora_up.weight": ("lora", "up"),
        ".dora_scale": (ANY, MAGNITUDE),
        ".lora_magnitude_vector": (ANY, MAGNITUDE),
    },
    header_entries=(PEFT_METADATA,),
)
