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
from loratool.core.architecture import Architecture, Resolver, Spoken, Voice
from loratool.core.errors import FormatError, NotRepresentable
from loratool.core.layout import ANY, MAGNITUDE, VECTOR, Layout
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor
from loratool.layouts._lycoris import LOHA, LOKR
from loratool.layouts._peft_config import (
    all_paths,
    alphas,
    config_of,
    json_object,
    path_of,
    paths_said,
    peft_magnitude,
    peft_obstacle,
    without_adapter_name,
)
from loratool.layouts._peft_kinds import KINDS

_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Peft(Layout):
    """The PEFT folder."""

    def rewrite(self, key: str) -> str:
        """Without a leftover adapter name, and without the `.weight` of a magnitude or embedding."""
        key = without_adapter_name(key)
        return key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key

    def resolver(self, architecture: Architecture, metadata: Mapping[str, str]) -> Resolver:
        """In a sub-folder named after a component, only what belongs to that component."""
        usual = super().resolver(architecture, metadata)

        def resolve(stem: str) -> Sequence[Spoken]:
            folder, slash, name = stem.rpartition("/")
            spoken = usual(name)
            if not folder:
                return spoken
            own = [said for said in spoken if said.component == folder] or spoken
            return [said._replace(voice=Voice(folder + slash + said.voice.prefix, said.voice.naming)) for said in own]

        return resolve

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
            for i, module in zip(at, _told(parse_config(text), named), strict=True):
                modules[i] = module
        if without:
            note = f"no {CONFIG} beside the file: alpha is unknown and taken as the rank"
            if all(modules[i].family.id == "lora" for i in without):
                adapter = replace(adapter, notes=(*adapter.notes, note))
            else:
                missing = (
                    f"no {CONFIG} beside the file: what it says of scales and of how rotations are computed is unknown"
                )
                adapter = replace(adapter, notes=(*adapter.notes, missing))
        if any("alora_invocation_tokens" in text and _is_activated(text) for text in adapter.side_files.values()):
            note = "an activated LoRA (aLoRA): PEFT applies it behind its invocation tokens only, other programs always"
            adapter = replace(adapter, notes=(*adapter.notes, note))
        return replace(adapter, modules=tuple(modules))

    def meant(self, family: str, factors: Mapping[str, LazyTensor]) -> tuple[str, Mapping[str, str]]:
        """IA3's vector lies along the side that it is of."""
        vector = factors.get("output_l")
        if vector is not None and len(vector.shape) == 2 and vector.shape[0] == 1 and vector.shape[1] > 1:
            return family, {"output_l": "input_l"}
        return super().meant(family, factors)

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
            kind = _kind_of(component, adapter.of(component))
            config: dict[str, Any] = {
                "peft_type": kind,
                "task_type": None,
                "base_model_name_or_path": None,
                "inference_mode": True,
            }
            config |= {"bias": "none", "fan_in_fan_out": False} if kind != "LOHA" and kind != "LOKR" else {}
            kept = _kept(adapter, component, kind)
            config |= {"modules_to_save": None} | kept
            if kind == "LORA":
                config |= {"use_rslora": False} | config_of(modules, others)
            else:
                # What was read and is written as it is, is described by the config that was read.
                unchanged = kept and all(module.keys for _, module in modules)
                config |= {} if unchanged else KINDS[kind].write(modules)
                config |= {"target_modules": paths_said([path for path, _ in modules], others)}
            sides[("" if single else f"{component}/") + CONFIG] = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return Bundle(bundle.tensors, metadata, sides)


def _folder(key: str) -> str:
    """The sub-folder in front of a key, with its slash, or nothing."""
    return key[: key.rfind("/") + 1]


def _told(config: Mapping[str, Any], named: Sequence[tuple[str, Module]]) -> list[Module]:
    """The modules with what their config says about them."""
    kind = config.get("peft_type", "LORA")
    wanted = "lora" if kind == "LORA" else KINDS[kind].family
    other = next((module for _, module in named if module.family.id != wanted), None)
    if other is not None:
        raise FormatError(f"peft_type is {kind!r}, but a module is of another kind: {other.title}", key=CONFIG)
    if kind != "LORA":
        return KINDS[kind].read(config, named)
    return [replace(module, alpha=alpha) for (_, module), alpha in zip(named, alphas(config, named), strict=True)]


def _kind_of(component: str, modules: Sequence[Module]) -> str:
    """The one `peft_type` of a component's modules. Raises NotRepresentable for several families."""
    families = dict.fromkeys(module.family.id for module in modules)
    if len(families) > 1:
        raise NotRepresentable(
            f"{component} has modules of several families ({', '.join(families)}), and PEFT knows one for a folder",
            hint="rewrite them with --approximate lora and --rank N or --energy E",
        )
    found = next(iter(families))
    return next((kind for kind, one in KINDS.items() if one.family == found), "LORA")


def _is_activated(text: str) -> bool:
    return bool(json_object(text, CONFIG).get("alora_invocation_tokens"))


def _kept(adapter: Adapter, component: str, kind: str) -> dict[str, Any]:
    """What the config of an adapter that was read from a PEFT folder says beside names, ranks and scales: the base
    model, the task, `fan_in_fan_out`, `modules_to_save`, ... Fields that choose modules are left to the new names."""
    if adapter.layout != LAYOUT.id:
        return {}
    folder = next((_folder(key) for module in adapter.of(component) for key in module.keys.values()), "")
    text = adapter.side_files.get(folder + CONFIG)
    if text is None:
        return {}
    config = parse_config(text)
    return config | dict.fromkeys(_CHOOSING) if config.get("peft_type", "LORA") == kind else {}


def parse_config(text: str) -> dict[str, Any]:
    """The config as a dict. FormatError if it is no JSON object or of a kind that is not known."""
    config = json_object(text, CONFIG)
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or (kind != "LORA" and kind not in KINDS):
        raise FormatError(f"peft_type is {kind!r}; can be read: LORA, {', '.join(KINDS)}", key=CONFIG)
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
        **LOHA,
        **LOKR,
        ("ia3", "input_l"): ".ia3_l",
        ("ia3", "output_l"): ".ia3_l",
        ("oft", "R"): ".oft_R.weight",
        ("boft", "R"): ".boft_R",
        ("boft", "s"): ".boft_s",
        (ANY, MAGNITUDE): VECTOR,
    },
    elsewhere=frozenset({("oft", "terms"), ("oft", "eps"), ("lokr", "scale")}),
    folder=True,
)
