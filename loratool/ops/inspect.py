"""inspect: everything `loratool info` says about a file, as data. Reads headers and alpha scalars, never torch."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from loratool.core.adapter import CONFIG, PEFT_METADATA, Adapter
from loratool.core.detect import NEAR
from loratool.core.layout import fits
from loratool.core.module import Module
from loratool.files.bundle import adapter_files
from loratool.files.safetensors import check_quick
from loratool.ops.open import Opened, open_detected

_Counted = TypeVar("_Counted", int, str)

TOP_TAGS = 12

MOST_HEADER = 40_000_000
"""Bytes of a header that are read for a look at a file."""

MOST_TENSORS = 15_000
"""So many tensors are read for a look at a file: a full adapter of a large model has some 3,000."""


class ComponentInfo(NamedTuple):
    """One component's modules: counts by rank, by alpha ("none" where the file has none) and by block."""

    modules: int
    parameters: int
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    blocks: Mapping[str, int]
    families: Mapping[str, int]


class ModuleInfo(NamedTuple):
    """One module: the paths of its targets, its sizes, and under which key each role stands in the file."""

    component: str
    targets: tuple[str, ...]
    family: str
    rank: int
    alpha: float | None
    scale: float
    shape: tuple[int, ...]
    dtype: str
    dora: bool
    keys: Mapping[str, str]


class Info(NamedTuple):
    """What a file is. Sizes in bytes, `architecture_score` the share of its keys' names that the tables know,
    `standard_modules` the number of modules whose size is the standard model's, `embeddings` the vectors of each
    textual inversion in the file."""

    path: str
    layout: str
    layout_title: str
    architecture: str
    architecture_title: str
    architecture_score: float
    runner_up: Mapping[str, float]
    standard_width: bool
    standard_modules: int
    written_by: str | None
    families: Mapping[str, int]
    modules: int
    components: Mapping[str, ComponentInfo]
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    dtypes: Mapping[str, int]
    dora: int
    parameters: int
    size_bytes: int
    training: Mapping[str, str]
    tags: Sequence[tuple[str, int]]
    trigger: str | None
    webui_tag: str
    metadata: Mapping[str, str]
    side_files: Mapping[str, str]
    embeddings: Mapping[str, int]
    unread_keys: Sequence[str]
    unread_families: Mapping[str, int]
    notes: Sequence[str]
    module_list: Sequence[ModuleInfo]


def inspect(path: str | os.PathLike[str], architecture: str | None = None, keys: bool = False) -> Info:
    """What the file or folder at `path` is; with `keys`, module by module.

    Raises LoratoolError where it is no adapter, or a broken one. Nothing of the file stays open.
    """
    _check_quick(path)
    return describe(open_detected(path, architecture=architecture), keys)


def _check_quick(path: str | os.PathLike[str]) -> None:
    """Raises FormatError for what would take more than a second, or more than 150 MB."""
    try:
        files = adapter_files(Path(path))
    except (OSError, ValueError):
        return  # opening it will say so
    for file in files:
        if file.name != CONFIG and file.exists():
            check_quick(file, MOST_HEADER, MOST_TENSORS)


def describe(opened: Opened, keys: bool = False) -> Info:
    """What an opened adapter is; with `keys`, module by module."""
    adapter, best = opened.adapter, opened.detection.best
    runner = opened.detection.runner_up
    close = runner is not None and (best.architecture.open or runner.score > best.score - NEAR)
    metadata = adapter.metadata
    standard = sum([fits(module.targets, module.shape) for module in adapter.modules])
    components = {component: _component(adapter.of(component)) for component in adapter.components}
    return Info(
        path=adapter.path,
        layout=adapter.layout,
        layout_title=best.layout.title,
        architecture=adapter.architecture.id,
        architecture_title=adapter.architecture.title,
        architecture_score=round(best.resolved, 4) if not best.architecture.open else 0.0,
        runner_up={runner.architecture.id: round(runner.resolved, 4)} if runner and close else {},
        standard_width=standard == len(adapter.modules),
        standard_modules=standard,
        written_by=_written_by(metadata, adapter.side_files),
        families=dict(Counter(module.family.id for module in adapter.modules)),
        modules=len(adapter.modules),
        components=components,
        ranks=_total(component.ranks for component in components.values()),
        alphas=_total(component.alphas for component in components.values()),
        dtypes=dict(Counter(t.dtype for m in adapter.modules for t in m.factors.values() if t.shape).most_common()),
        dora=sum(module.magnitude is not None for module in adapter.modules),
        parameters=sum(component.parameters for component in components.values()),
        size_bytes=adapter.size_bytes,
        training=_training(metadata),
        tags=_tags(metadata),
        trigger=metadata.get("modelspec.trigger_phrase") or _learned_tokens(adapter),
        webui_tag=f"<lora:{Path(adapter.path).stem}:1>",
        metadata=metadata,
        side_files=adapter.side_files,
        embeddings=_embeddings(adapter),
        unread_keys=tuple(adapter.extras),
        unread_families=adapter.unread_families,
        notes=adapter.notes,
        module_list=[_module(module) for module in adapter.modules] if keys else (),
    )


def _module(module: Module) -> ModuleInfo:
    return ModuleInfo(
        component=module.component,
        targets=tuple(target.path for target in module.targets),
        family=module.family.id,
        rank=module.rank,
        alpha=module.alpha,
        scale=module.scale,
        shape=module.shape,
        dtype=module.dtype,
        dora=module.magnitude is not None,
        keys=module.keys,
    )


def _component(modules: Sequence[Module]) -> ComponentInfo:
    ranks = Counter([module.rank for module in modules])
    del ranks[0]
    return ComponentInfo(
        modules=len(modules),
        parameters=sum([module.parameters for module in modules]),
        ranks=dict(ranks.most_common()),
        alphas=_alphas(modules),
        blocks=dict(Counter([block_of(module) for module in modules])),
        families=dict(Counter([module.family.id for module in modules])),
    )


def _total(counts: Iterable[Mapping[_Counted, int]]) -> dict[_Counted, int]:
    """Counts added up, the most frequent first."""
    total: Counter[_Counted] = Counter()
    for part in counts:
        total.update(part)
    return dict(total.most_common())


def block_of(module: Module) -> str:
    """The block a module belongs to: its path up to the first number, or its first part (all of a UNet's middle)."""
    path = module.targets[0].module_path
    if "." not in path:
        flattened = re.match(r"(.*?)_(\d+)_", path)
        if flattened is not None:
            return f"{flattened[1]}.{flattened[2]}"
    parts = path.split(".")
    if parts[0].startswith("mid"):
        return parts[0]
    for end, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: end + 1])
    return parts[0]


def _alphas(modules: Sequence[Module]) -> dict[str, int]:
    counted = Counter([module.alpha for module in modules])
    told: Counter[str] = Counter()
    for alpha, count in counted.items():
        told["none" if alpha is None else f"{alpha:g}"] += count
    return dict(told.most_common())


def _written_by(metadata: Mapping[str, str], sides: Mapping[str, str]) -> str | None:
    """The program that wrote the file, where its metadata say so."""
    if any(key.startswith("loratool.") for key in metadata):
        from loratool.ops import origin, recipe

        ticket = origin.decode(metadata)
        if ticket is not None:
            return f"loratool, converted from {ticket.layout}"
        made = recipe.told(metadata)
        if made is not None:
            return made
    if "software" in metadata:
        software = _json(metadata["software"])
        if isinstance(software, dict) and "name" in software:
            return f"{software['name']} {software.get('version', '')}".strip()
        return metadata["software"][:60]
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    if "ss_network_module" in metadata or "ss_sd_scripts_commit_hash" in metadata:
        module = metadata.get("ss_network_module", "")
        return "LyCORIS on sd-scripts" if module.startswith("lycoris") else f"sd-scripts ({module or 'kohya'})"
    if "modelspec.implementation" in metadata:
        return metadata["modelspec.implementation"][:60]
    if PEFT_METADATA in metadata:
        return "diffusers (with adapter metadata)"
    for text in sides.values():
        config = _json(text)
        if isinstance(config, dict):
            return "mlx-lm" if "fine_tune_type" in config else f"PEFT {config.get('peft_version', '')}".strip()
    return None


_FACTS = (
    ("title", ("modelspec.title", "ss_output_name")),
    ("author", ("modelspec.author",)),
    ("license", ("modelspec.license",)),
    ("base model", ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")),
    ("resolution", ("ss_resolution", "modelspec.resolution")),
    ("images", ("ss_num_train_images",)),
    ("steps", ("ss_steps", "ss_max_train_steps")),
    ("epochs", ("ss_epoch", "ss_num_epochs")),
    ("learning rate", ("ss_learning_rate",)),
    ("unet lr", ("ss_unet_lr",)),
    ("text encoder lr", ("ss_text_encoder_lr",)),
    ("optimizer", ("ss_optimizer",)),
    ("trained", ("ss_training_started_at", "modelspec.date")),
)


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    facts = {}
    for title, keys in _FACTS:
        value = next((metadata[key] for key in keys if metadata.get(key) not in (None, "", "None")), None)
        if value is not None:
            facts[title] = _date(value) if title == "trained" else value
    return facts


def _date(value: str) -> str:
    try:
        return datetime.fromtimestamp(float(value), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return value


def _tags(metadata: Mapping[str, str]) -> list[tuple[str, int]]:
    """The most frequent caption tags over all data sets."""
    frequency = _json(metadata.get("ss_tag_frequency", ""))
    counts: Counter[str] = Counter()
    for tags in frequency.values() if isinstance(frequency, dict) else ():
        if isinstance(tags, dict):
            counts.update({tag.strip(): n for tag, n in tags.items() if isinstance(n, int) and tag.strip()})
    return counts.most_common(TOP_TAGS)


def _learned_tokens(adapter: Adapter) -> str | None:
    """Tokens whose embeddings the file brings along (cloneofsimo)."""
    tokens = [key for key in adapter.extras if adapter.metadata.get(key) == "<embed>"]
    return " ".join(tokens) or None


_BUNDLED = re.compile(r"^bundle_emb\.(.+?)\.(?:string_to_param\.\*|emb_params|clip_l|clip_g|t5|[^.]*_out|vector)$")


def _embeddings(adapter: Adapter) -> dict[str, int]:
    """Name -> vectors of the textual inversions that the file brings along (`bundle_emb.NAME...`, `emb_params`)."""
    found: dict[str, int] = {}
    for key, tensor in adapter.extras.items():
        match = _BUNDLED.match(key)
        name = match[1] if match else "emb_params" if key == "emb_params" else None
        if name is not None:
            vectors = tensor.shape[0] if len(tensor.shape) > 1 else 1
            found[name] = max(found.get(name, 0), vectors)
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
