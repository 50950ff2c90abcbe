"""Checkpoints for tests: every weight of the real models by its real name and shape, in files without data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from loratool.core.architecture import Voice
from loratool.core.registry import architectures
from loratool.core.tensor import DTYPES

Shapes = Mapping[str, tuple[int, ...]]


def sparse_checkpoint(path: Path, architecture_id: str, checkpoint_id: str, dtype: str = "F16") -> Path:
    """Writes a checkpoint with all weights of a model (no biases), zeros that take no room on the disk; returns `path`.

    Where components share a prefix (diffusers) it is a folder with one sub-folder for each, and a `model_index.json`.
    """
    shapes = checkpoint_shapes(architecture_id, checkpoint_id)
    if len({voice.prefix for voice in _voices(architecture_id, checkpoint_id).values()}) == len(shapes):
        return sparse_file(path, {key: shape for one in shapes.values() for key, shape in one.items()}, dtype)
    path.mkdir(parents=True, exist_ok=True)
    (path / "model_index.json").write_text("{}", encoding="utf-8")
    for component, one in shapes.items():
        name = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        sparse_file(path / component / f"{name}.safetensors", one, dtype)
    return path


def checkpoint_shapes(architecture_id: str, checkpoint_id: str) -> dict[str, Shapes]:
    """Component -> key -> shape of every weight, in one kind of checkpoint."""
    architecture = architectures()[architecture_id]
    found: dict[str, Shapes] = {}
    for component, voice in _voices(architecture_id, checkpoint_id).items():
        naming = architecture.naming(component, voice.naming)
        shapes: dict[str, tuple[int, ...]] = {}
        for targets in naming.values():
            home = naming.home(targets[0])
            key = voice.prefix + home.tensor_key
            shape = (sum(target.rows for target in targets), *targets[0].shape[1:])
            shapes[key] = shape[::-1] if home.transposed else shape
        found[component] = shapes
    return found


def _voices(architecture_id: str, checkpoint_id: str) -> Mapping[str, Voice]:
    checkpoints = {one.id: one for one in architectures()[architecture_id].checkpoints}
    return checkpoints[checkpoint_id].voices


def sparse_file(path: Path, shapes: Shapes, dtype: str = "F16", metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with these shapes and no data on the disk; returns `path`. Creates its folder."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * DTYPES[dtype] // 8
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)
    return path
