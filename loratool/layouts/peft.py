"""peft: a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT's `save_pretrained` writes it.

Alpha lives in the config, one for all modules or by pattern. An adapter with several components is one folder
with a sub-folder for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.core.adapter import CONFIG, Adapter, Bundle
from loratool.core.architecture import Architecture, Spoken, Voice
from loratool.core.errors import FormatError
from loratool.core.layout import ANY, MAGNITUDE, VECTOR, Layout
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

_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Peft(Layout):
    """The PEFT folder."""

    def rewrite(self, key: str) -> str:
        """Without a leftover adapter name, and without the `.weight` of a magnitude or embedding."""
        key = without_adapter_name(key)
        return key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key

    def resolve(self, stem: str, architecture: Architecture, metadata: Mapping[str, str]) -> Sequence[Spoken]:
        """In a sub-folder named after a component, only what belongs to that component."""
        folder, slash, name = stem.rpartition("/")
        spoken = super().resolve(name, architecture, metadata)
        own = [said for said in spoken if said.component == folder] or spoken
        return [replace(said, voice=Voice(folder + slash + said.voice.prefix, said.voice.naming)) for said in own]

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """Alphas from the config of each component's folder."""
        modules = list(adapter.modules)
        folders = [_folder(next(iter(module.keys.values()))) for module in modules]
        without = []
        for folder in dict.fromkeys(folders):
            text = adapter.side_files.get(folder + CONFIG)
            at = [i for i, other in enumerate(folders) if other == folder and modules[i].alpha is None]
            if text is None:
                without += at
                continue
            named = [(path_of(modules[i], adapter.architecture, adapter.voices), modules[i]) for i in at]
            for i, alpha in zip(at, alphas(parse_config(text), named), strict=True):
                modules[i] = replace(modules[i], alpha=alpha)
        if without:
            note = f"no {CONFIG} beside the file: alpha is unknown and taken as the rank"
            adapter = replace(adapter, notes=(*adapter.notes, note))
        return replace(adapter, modules=tuple(modules))

    def obstacle(self, module: Module) -> str | None:
        """PEFT's magnitude is per output feature."""
        return peft_obstacle(module, self.id) or super().obstacle(module)

    def stored_magnitude(self, module: Module) -> LazyTensor:
        """`(out,)`, for a convolution `(1, out, 1, 1)`."""
        return peft_magnitude(module)

    def voices_for(self, adapter: Adapter) -> Mapping[str, Voice]:
        """With the component's sub-folder in front where there are several components."""
        voices = super().voices_for(adapter)
        if len(adapter.components) < 2:
            return voices
        return {component: Voice(f"{component}/{voice.prefix}", voice.naming) for component, voice in voices.items()}

    def finish(self, adapter: Adapter, bundle: Bundle, voices: Mapping[str, Voice]) -> Bundle:
        """With one config per component."""
        single = len(adapter.components) == 1
        metadata = {**bundle.metadata, "format": "pt"}
        sides = {}
        for component in adapter.components:
            modules = [(path_of(module, adapter.architecture, voices), module) for module in adapter.of(component)]
            others = all_paths(adapter.architecture, component, voices)
            config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
            config |= {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None}
            config |= _kept(adapter, component) | {"use_rslora": False} | config_of(modules, others)
            sides[("" if single else f"{component}/") + CONFIG] = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return Bundle(bundle.tensors, metadata, sides)


def _folder(key: str) -> str:
    """The sub-folder in front of a key, with its slash, or nothing."""
    return key[: key.rfind("/") + 1]


def _kept(adapter: Adapter, component: str) -> dict[str, Any]:
    """What the config of an adapter that was read from a PEFT folder says beside names, ranks and scales: the base
    model, the task, `fan_in_fan_out`, `modules_to_save`, ... Fields that choose modules are left to the new names."""
    if adapter.layout != LAYOUT.id:
        return {}
    folder = next((_folder(key) for module in adapter.of(component) for key in module.keys.values()), "")
    text = adapter.side_files.get(folder + CONFIG)
    if text is None:
        return {}
    return parse_config(text) | dict.fromkeys(_CHOOSING)


def parse_config(text: str) -> dict[str, Any]:
    """The config as a dict. FormatError if it is no JSON object or of another kind than LoRA."""
    config = json_object(text, CONFIG)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise FormatError(f"peft_type is {kind!r}; only LORA can be read so far", key=CONFIG)
    return config


LAYOUT = Peft(
    id="peft",
    title="PEFT folder",
    separator=".",
    spelling={
        ("lora", "down"): ".lora_A.weight",
        ("lora", "up"): ".lora_B.weight",
        ("lora", "bias"): ".lora_B.bias",
        ("lora", "embedding_A"): ".lora_embedding_A",
        ("lora", "embedding_B"): ".lora_embedding_B",
        (ANY, MAGNITUDE): VECTOR,
    },
    folder=True,
)
