"""Bundle and Adapter: one file before and after its meaning is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratool.core.architecture import Architecture, Voice
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor

CONFIG = "adapter_config.json"
"""PEFT's config, the side file of an adapter's folder."""

PEFT_METADATA = "lora_adapter_metadata"
"""The header entry in which diffusers keeps that config, every field with its component in front."""

RECIPE = "loratool.recipe"
"""The header entry that says how a file was made."""

SAFETENSORS, MLX, GGUF = "safetensors", "mlx", "gguf"
"""Containers: a safetensors file or a PEFT folder of them, mlx-lm's folder, a GGUF file."""


@dataclass(frozen=True)
class Bundle:
    """One file or folder, before meaning: tensors, header metadata and text files beside them.

    A folder with one sub-folder per component spells both kinds of keys with the sub-folder in front
    (`unet/base_model.model...`, `unet/adapter_config.json`). `container` is what it is kept in on disk, `notes` are
    sentences about what of it could not be kept.
    """

    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    side_files: Mapping[str, str] = field(default_factory=dict)
    path: str = ""
    size_bytes: int = 0
    container: str = SAFETENSORS
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """What operations take and return: modules in file order, and everything else the file held.

    `voices` says in which voice each component was read; `extras` are tensors that belong to no module,
    under their keys; `unread_families` counts extras that belong to a kind of adapter that has no plug-in yet.
    `notes` are sentences for the user about how the file was understood; `stored` the file's tensors by key.
    """

    modules: tuple[Module, ...]
    architecture: Architecture
    layout: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, LazyTensor] = field(default_factory=dict)
    voices: Mapping[str, Voice] = field(default_factory=dict)
    side_files: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unread_families: Mapping[str, int] = field(default_factory=dict)
    path: str = ""
    size_bytes: int = 0
    stored: Mapping[str, LazyTensor] = field(default_factory=dict, repr=False)

    @property
    def components(self) -> tuple[str, ...]:
        """Components that have modules, in the architecture's order, then in file order."""
        present = dict.fromkeys(module.component for module in self.modules)
        known = [component for component in self.architecture.components if component in present]
        return (*known, *(component for component in present if component not in known))

    def of(self, component: str) -> tuple[Module, ...]:
        """The modules of one component."""
        return tuple(module for module in self.modules if module.component == component)

    @property
    def ranks(self) -> Counter[int]:
        """How many modules have which rank; those of families without ranks are not counted."""
        return Counter(module.rank for module in self.modules if module.rank)
