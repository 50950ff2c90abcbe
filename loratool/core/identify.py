"""Identify: files that hold weights, but no adapter: checkpoints, VAEs, textual inversions. From the keys alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture, Voice
from loratool.core.naming import Home
from loratool.core.registry import architectures
from loratool.core.target import Target, same_shape
from loratool.core.tensor import LazyTensor

_ADAPTER_SIGNS = ("lora_", ".lora.", "_lora", ".lora", "lokr_", "hada_", ".oft_", ".boft_", ".ia3_l", "dora_scale")
_ADAPTER_ENDS = (".alpha", ":up", ":down", ".diff", ".diff_b", ".on_input", ".w_norm", ".b_norm", ".set_weight")
_VAE = ("decoder.conv_in.weight", "encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")
_EMBEDDINGS = ("emb_params", "string_to_param", "clip_l", "clip_g", "t5xxl")


class Other(NamedTuple):
    """What a file is instead of an adapter, and what to do with it."""

    what: str
    hint: str


def what_it_is(bundle: Bundle) -> Other | None:
    """What a bundle is if it is no adapter; None if it may be one."""
    keys = bundle.tensors
    if not keys:
        return Other("empty: it holds no tensor", "download it again")
    if any(key.endswith(_ADAPTER_ENDS) or any(sign in key for sign in _ADAPTER_SIGNS) for key in keys):
        return None
    embedding = _textual_inversion(bundle)
    if embedding is not None:
        return embedding
    model = checkpoint_of(keys)
    if model is not None:
        return Other(f"a checkpoint of {model.title}", "a LoRA for it can be baked into it; name the LoRA file here")
    if any(key in keys for key in _VAE):
        return Other("a VAE", "put it into your program's VAE folder")
    weights = sum(key.endswith(".weight") for key in keys)
    if weights > 0.3 * len(keys):
        return Other("a checkpoint of a model that is not known", "name a LoRA file")
    return None


def _textual_inversion(bundle: Bundle) -> Other | None:
    """One or few small matrices of token vectors."""
    shapes = [tensor.shape for tensor in bundle.tensors.values()]
    named = all(key.split(".")[0] in _EMBEDDINGS or key.startswith("<") for key in bundle.tensors)
    small = all(len(shape) in (1, 2) and (len(shape) == 1 or shape[0] <= 256) for shape in shapes)
    if (
        len(shapes) <= 4
        and small
        and (named or (len(shapes) == 1 and not next(iter(bundle.tensors)).endswith(".weight")))
    ):
        vectors = max(shape[0] if len(shape) == 2 else 1 for shape in shapes)
        return Other(
            f"a textual inversion (embedding) of {vectors} vectors",
            "put it into your program's embeddings folder and write its name in the prompt",
        )
    return None


def checkpoint_of(keys: Mapping[str, LazyTensor]) -> Architecture | None:
    """The model, in its size, whose checkpoint holds these keys: over half of the weights of one of its components.

    Of several the one with most of its names and shapes in the file, and most of the file in its names.
    """
    best, found = 0.0, None
    for architecture in architectures().values():
        for size in architecture.sizes if not architecture.open else ():
            likeness = _likeness(keys, size)
            if likeness > best:
                best, found = likeness, size
            if not likeness:
                break
    return found


def _likeness(keys: Mapping[str, LazyTensor], architecture: Architecture) -> float:
    """How alike the file and the likest kind of checkpoint are: names and shapes that both have over those that either
    has (Dice), in components of which more than half is there; 0 if there is none."""
    best = 0.0
    for checkpoint in architecture.checkpoints:
        common, either = 0, len(keys)
        for component, voice in checkpoint.voices.items():
            if voice.prefix and not any(key.startswith(voice.prefix) for key in keys):
                continue
            if not _may_hold(keys, architecture, component, voice):
                continue
            naming = architecture.naming(component, voice.naming)
            held = fitting = 0
            for targets in naming.values():
                home = naming.home(targets[0])
                tensor = keys.get(voice.prefix + home.tensor_key)
                if tensor is not None:
                    held += 1
                    fitting += same_shape(tensor.shape, _stored(targets, home))
            if 2 * held > len(naming):
                common += held + fitting
                either += len(naming)
        best = max(best, common / either if keys else 0.0)
    return best


def _may_hold(keys: Mapping[str, LazyTensor], architecture: Architecture, component: str, voice: Voice) -> bool:
    """Whether a quarter of what the outline names is there: else the whole table need not be built."""
    if component not in architecture.outlines:
        return True
    outline = architecture.sketch.naming(component, voice.naming)
    homes = (outline.home(targets[0]) for targets in outline.values())
    return 4 * sum(voice.prefix + home.tensor_key in keys for home in homes) >= len(outline)


def _stored(targets: Sequence[Target], home: Home) -> tuple[int, ...]:
    """The shape in which a checkpoint stores the weight of these targets."""
    shape = (sum(target.rows for target in targets), *targets[0].shape[1:])
    return shape[::-1] if home.transposed else shape
