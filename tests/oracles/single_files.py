"""Single-file checkpoints of the small pipelines, as the models' own programs keep them, and diffusers' reader of them.

Names and row orders come from the architecture tables. That they are right is proved by diffusers, which reads the
files back to the very weights they were made of (`test_bake_diffusers.py` begins with that).
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_model
from safetensors.torch import save_file

from loratool.core.naming import Naming
from loratool.core.registry import architectures
from loratool.core.target import Target
from tests.oracles.models import complaints, components

Tensors = dict[str, torch.Tensor]

OTHERS: Mapping[str, Tensors] = {
    "sd15": {
        "alphas_cumprod": torch.linspace(1, 0, 10, dtype=torch.float64),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16).unsqueeze(0),
        "first_stage_model.decoder.conv_in.weight": torch.ones(4, 4, 3, 3, dtype=torch.float16),
        "model_ema.num_updates": torch.tensor(7),
    },
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(16).unsqueeze(0),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "first_stage_model.decoder.conv_in.weight": torch.ones(4, 4, 3, 3, dtype=torch.float16),
    },
    "flux": {},
}
"""What else real files hold: none of it may be touched."""

_FLUX, _WIDTH = "FluxTransformer2DModel", 3072


def single_file(pipe: Any, architecture: str, checkpoint: str, path: Path) -> Path:
    """Writes the weights and biases of a pipeline as one file in the spelling of `checkpoint`; returns `path`."""
    table = architectures()[architecture]
    voices = next(one.voices for one in table.checkpoints if one.id == checkpoint)
    tensors = dict(OTHERS[architecture])
    for component in components(pipe):
        if component in voices:
            voice = voices[component]
            state = {_short(k): tensor for k, tensor in getattr(pipe, component).state_dict().items()}
            canonical = next(iter(table.namings(component).values()))
            renamed = _renamed(state, canonical, table.naming(component, voice.naming))
            tensors |= {voice.prefix + key: tensor for key, tensor in renamed.items()}
    save_file(tensors, path, {"modelspec.title": "a small model", "format": "pt"})
    return path


def _short(key: str) -> str:
    return key.removeprefix("text_model.")


def _renamed(state: Tensors, canonical: Naming, naming: Naming) -> Tensors:
    """A state dict of diffusers under the keys of another naming, rows put together as that one has them."""
    made: Tensors = {}
    for targets in naming.values():
        home = naming.home(targets[0])
        for kind in ("weight", "bias"):
            rows = [_rows(state, canonical, target, kind) for target in targets]
            if (found := [part for part in rows if part is not None]) and len(found) == len(targets):
                tensor = torch.cat(found)
                made[_key(home.tensor_key, kind)] = (tensor.T if home.transposed else tensor).contiguous()
    return made


def _rows(state: Tensors, canonical: Naming, target: Target, kind: str) -> torch.Tensor | None:
    """The rows of a target, which the table counts in the standard model; None in a block that a small one lacks."""
    home = canonical.home(target)
    tensor = state.get(f"{_short(home.name)}.{kind}")
    if tensor is None:
        return None
    standard = sum(one.rows for one in canonical[home.name])
    first, last = (row * tensor.shape[0] // standard for row in (home.first_row, home.first_row + target.rows))
    return tensor[first:last].clone()


def _key(weight: str, kind: str) -> str:
    return weight if kind == "weight" else f"{weight.removesuffix('weight')}bias"


def from_single_file(pipe: Any, path: Path, config: Path, **given: Any) -> Any:
    """A pipeline like `pipe` that diffusers makes of a file and of the configs in the folder `config`.

    There is no VAE and no tokenizer; `given` are other components that the file does not hold.
    """
    given = absent(pipe) | given
    if hasattr(pipe, "safety_checker"):
        given["requires_safety_checker"] = False
    with complaints(), _flux_of(pipe.transformer.inner_dim if hasattr(pipe, "transformer") else _WIDTH):
        return type(pipe).from_single_file(str(path), config=str(config), local_files_only=True, **given)


def absent(pipe: Any) -> dict[str, None]:
    """The components that a pipeline has not, each None: its loaders insist on being told."""
    expected, _ = type(pipe)._get_signature_keys(type(pipe))
    return {name: None for name in expected if getattr(pipe, name, None) is None}


@contextmanager
def _flux_of(width: int) -> Iterator[None]:
    """diffusers' converter for Flux, whose width is a constant in its code, at another width."""
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[_FLUX]
    original = entry["checkpoint_mapping_fn"]
    code = original.__code__
    assert _WIDTH in code.co_consts
    constants = tuple(width if one == _WIDTH else one for one in code.co_consts)
    changed = code.replace(co_consts=constants)
    entry["checkpoint_mapping_fn"] = types.FunctionType(changed, original.__globals__, original.__name__)
    try:
        yield
    finally:
        entry["checkpoint_mapping_fn"] = original
