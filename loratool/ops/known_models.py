"""Known models: what a checkpoint is by its header, and under which names its model was published."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture
from loratool.core.identify import checkpoint_of, what_it_is
from loratool.core.registry import architectures
from loratool.core.target import same_shape
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import PICKLES
from loratool.files.checkpoint import not_read, read_checkpoint
from loratool.ops.base import telling_part

_MOST_OTHER_SHAPES = 0.05
"""Share of weights that may differ in shape: an inpainting model has another first convolution, nothing else. Stable
Diffusion 2 has the names of 1.x and 8% other shapes."""


@dataclass(frozen=True)
class Published:
    """Where a model was published: repositories of the Hugging Face hub, and the usual names of its file.

    `repositories` maps each to the one file in it that is the whole model; the first is what gets downloaded.
    `files` are stems, the most usual first. `gigabytes` (10^9 bytes) is the size of the download.
    """

    repositories: Mapping[str, str]
    files: tuple[str, ...]
    gigabytes: float

    @property
    def download(self) -> tuple[str, str]:
        """(repository, file)."""
        return next(iter(self.repositories.items()))


PUBLISHED: Mapping[str, Published] = {
    "sd15": Published(
        {
            "stable-diffusion-v1-5/stable-diffusion-v1-5": "v1-5-pruned-emaonly.safetensors",
            "runwayml/stable-diffusion-v1-5": "v1-5-pruned-emaonly.safetensors",
            "Comfy-Org/stable-diffusion-v1-5-archive": "v1-5-pruned-emaonly-fp16.safetensors",
        },
        ("v1-5-pruned-emaonly", "v1-5-pruned-emaonly-fp16", "v1-5-pruned", "sd-v1-5", "sd15"),
        4.3,
    ),
    "sdxl": Published(
        {"stabilityai/stable-diffusion-xl-base-1.0": "sd_xl_base_1.0.safetensors"},
        ("sd_xl_base_1.0", "sd_xl_base_1.0_0.9vae", "stable-diffusion-xl-base-1.0", "sdxl"),
        6.9,
    ),
    "flux": Published(
        {
            "black-forest-labs/FLUX.1-dev": "flux1-dev.safetensors",
            "Comfy-Org/flux1-dev": "flux1-dev-fp8.safetensors",
            "black-forest-labs/FLUX.1-schnell": "flux1-schnell.safetensors",
        },
        ("flux1-dev", "flux1-schnell"),
        23.8,
    ),
}
"""By id of the architecture. A model that is not here has its name all the same, but nothing is known by file name."""


@dataclass(frozen=True)
class Look:
    """What a header says: the id of the model if its table fits, what it is in words, and how many bytes it has.

    `checkpoint` is False for LoRAs, VAEs, embeddings and the like.
    """

    architecture: str | None
    what: str
    size_bytes: int
    checkpoint: bool = True


def models() -> Mapping[str, Architecture]:
    """The models that have a table, by id."""
    return {name: one for name, one in architectures().items() if not one.open}


def look_at(path: str | os.PathLike[str]) -> Look:
    """What the checkpoint at `path` is, by its headers. A folder is what its unet or transformer is.

    Raises FormatError for what cannot be read.
    """
    if Path(path).suffix.lower() in PICKLES and os.path.isfile(path):
        raise not_read(Path(path))
    files = read_checkpoint(path)
    keys = telling_part(files)
    model = checkpoint_of(keys)
    if model is None:
        other = what_it_is(Bundle(dict(keys)))
        known = other is not None and other.what.startswith("a checkpoint")
        return Look(None, other.what if other else "an adapter, or unknown", files.size_bytes, known)
    held, other_shapes = _fit(keys, model)
    if not held:
        part = f"a part of {model.title} without its {next(iter(model.components))}"
        return Look(None, part, files.size_bytes)
    if other_shapes > _MOST_OTHER_SHAPES * held:
        relative = f"a relative of {model.title}: {other_shapes} of {held} weights have other shapes"
        return Look(None, relative, files.size_bytes)
    return Look(model.id, model.title, files.size_bytes)


def _fit(keys: Mapping[str, LazyTensor], model: Architecture) -> tuple[int, int]:
    """How many weights of the model's unet or transformer are there, in the best spelling, and how many do not fit.

    Nothing is there if it is less than half.
    """
    held, other, total = max(_fits(keys, model), default=(0, 0, 1))
    return (held, other) if 2 * held > total else (0, 0)


def _fits(keys: Mapping[str, LazyTensor], model: Architecture) -> Iterator[tuple[int, int, int]]:
    main = next(iter(model.components))
    for checkpoint in model.checkpoints:
        if main not in checkpoint.voices:
            continue
        voice = checkpoint.voices[main]
        naming = model.naming(main, voice.naming)
        held = other = 0
        for targets in naming.values():
            home = naming.home(targets[0])
            tensor = keys.get(voice.prefix + home.tensor_key)
            if tensor is not None:
                shape = (sum(target.rows for target in targets), *targets[0].shape[1:])
                held += 1
                other += not same_shape(tensor.shape[::-1] if home.transposed else tensor.shape, shape)
        yield held, other, len(naming)
