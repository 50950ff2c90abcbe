"""Transformers of image and video models: two namings from one list of rows, and the voices that programs share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loratool.core.architecture import Checkpoint, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming
from loratool.core.target import Target

COMPONENT = "transformer"

Shape = tuple[int, ...]


class Row(NamedTuple):
    """One weight of the original checkpoint: its name, and its parts in row order as (diffusers path, shape).

    Where parts are halves of one diffusers weight (`norm_out.linear:shift`, `:scale`), diffusers stacks them the other
    way round. `key` is the checkpoint's key where it is not `name + ".weight"`; `native` is "" for a weight that only
    diffusers has.
    """

    native: str
    parts: tuple[tuple[str, Shape], ...]
    key: str = ""


def row(native: str, path: str, *shape: int) -> Row:
    """A weight that both have."""
    return Row(native, ((path, shape),))


def fused(native: str, paths: Iterable[str], *shape: int) -> Row:
    """A weight that diffusers cuts into parts of one shape, in this order."""
    return Row(native, tuple((path, shape) for path in paths))


def swapped(native: str, path: str, *shape: int) -> Row:
    """A modulation of shift and scale, `shape` each: diffusers stacks scale on shift."""
    return Row(native, ((f"{path}:shift", shape), (f"{path}:scale", shape)))


def dit_namings(rows: Iterable[Row], component: str = COMPONENT, native: str = "native") -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, the original checkpoint's, which fuses."""
    diffusers: dict[str, tuple[Target, ...]] = {}
    original: dict[str, tuple[Target, ...]] = {}
    keys: dict[str, str] = {}
    for name, parts, key in rows:
        original[name] = targets = tuple(Target(component, path, shape) for path, shape in parts)
        if key:
            keys[name] = key
        if ":" in parts[0][0]:
            diffusers[targets[0].module_path] = targets[::-1]
        else:
            diffusers.update((target.path, (target,)) for target in targets)
    return {"diffusers": Naming(diffusers), native: Naming(original, keys)}


def same_namings(shapes: Mapping[str, Shape], component: str = COMPONENT) -> dict[str, Naming]:
    """The naming `diffusers` of a model whose original checkpoint has the names of diffusers."""
    return {"diffusers": Naming({path: (Target(component, path, shape),) for path, shape in shapes.items()})}


class Encoder(NamedTuple):
    """What programs call a text encoder: the prefix in kohya's spelling, and the name in ComfyUI's.

    `namings` are those that occur, the canonical one first; `exact` is that of its class in transformers, which PEFT
    needs, and the checkpoint of a pipeline has.
    """

    kohya: str
    comfyui: str
    namings: tuple[str, ...] = ("hf",)
    exact: str = "hf"


T5 = Encoder("lora_te3_", "t5xxl")
CLIP_G = Encoder("lora_te2_", "clip_g", ("hf", "hf-short"))
CLIP_L_PROJECTED = Encoder("lora_te1_", "clip_l", ("hf", "hf-short"))


class Voices(NamedTuple):
    """`writes`, `reads` and `checkpoints` of an architecture."""

    writes: dict[str, dict[str, Voice]]
    reads: dict[str, dict[str, tuple[Voice, ...]]]
    checkpoints: tuple[Checkpoint, ...]


def dit_voices(native: str, kohya: str | None = None, encoders: Mapping[str, Encoder] | None = None) -> Voices:
    """What programs call a transformer whose original naming is `native`, and its text encoders.

    `kohya` is the naming that the trainer with kohya's spelling has its modules in, if not the original one. Both that
    and diffusers' are read everywhere: trainers differ in which classes they load.
    """
    namings = tuple(dict.fromkeys((kohya or native, native, "diffusers")))
    writes: dict[str, dict[str, Voice]] = {
        "kohya": {COMPONENT: Voice("lora_unet_", kohya or native)},
        "diffusers": {COMPONENT: Voice("transformer.", "diffusers")},
        "comfyui": {COMPONENT: Voice("diffusion_model.", native)},
        "peft": {COMPONENT: Voice("base_model.model.", "diffusers")},
    }
    kohya_prefixes = ("lora_unet_", "lora_transformer_", "lycoris_")  # kohya, OneTrainer, LyCORIS's own wrapper
    reads: dict[str, dict[str, tuple[Voice, ...]]] = {
        "kohya": {COMPONENT: _voices(kohya_prefixes, namings)},
        "diffusers": {COMPONENT: (Voice("", "diffusers"),)},
        "comfyui": {COMPONENT: _voices(("diffusion_model.", "model.diffusion_model.", ""), (native, "diffusers"))},
        "peft": {
            COMPONENT: (*_voices(("base_model.model.",), namings), Voice("base_model.model.transformer.", "diffusers"))
        },
    }
    if native != "diffusers":  # bare diffusers names are diffusers' layout
        reads["comfyui"][COMPONENT] = tuple(v for v in reads["comfyui"][COMPONENT] if v != Voice("", "diffusers"))
    for component, encoder in (encoders or {}).items():
        _add_encoder(component, encoder, writes, reads)
    for layout, components in reads.items():
        for component, voices in components.items():
            unwritten = dict.fromkeys(voice for voice in voices if voice != writes[layout][component])
            components[component] = tuple(unwritten)
    return Voices(writes, reads, _checkpoints(native, encoders or {}))


def _voices(prefixes: Iterable[str], namings: Iterable[str]) -> tuple[Voice, ...]:
    namings = tuple(dict.fromkeys(namings))
    return tuple(Voice(prefix, naming) for prefix in prefixes for naming in namings)


def _add_encoder(
    component: str,
    encoder: Encoder,
    writes: dict[str, dict[str, Voice]],
    reads: dict[str, dict[str, tuple[Voice, ...]]],
) -> None:
    comfyui = f"text_encoders.{encoder.comfyui}.transformer."
    prefixes = {
        "kohya": (encoder.kohya,),
        "diffusers": (f"{component}.",),
        "comfyui": (comfyui, f"{encoder.comfyui}.transformer."),
        "peft": ("base_model.model.", f"base_model.model.{component}."),
    }
    for layout, spellings in prefixes.items():
        naming = encoder.exact if layout == "peft" else "hf"
        writes[layout][component] = Voice(spellings[0], naming)
        reads[layout][component] = _voices(spellings, (naming, *encoder.namings))


def _checkpoints(native: str, encoders: Mapping[str, Encoder]) -> tuple[Checkpoint, ...]:
    folder = {component: Voice("", encoder.exact) for component, encoder in encoders.items()}
    found = [
        Checkpoint("native", {COMPONENT: Voice("", native)}),
        Checkpoint(
            "comfyui",
            {COMPONENT: Voice("model.diffusion_model.", native)}
            | {c: Voice(f"text_encoders.{one.comfyui}.transformer.", "hf") for c, one in encoders.items()},
        ),
    ]
    if native != "diffusers" or folder:
        found.append(Checkpoint("diffusers", {COMPONENT: Voice("", "diffusers"), **folder}))
    return tuple(found)


def dit_blocks(
    series: Mapping[str, tuple[str, int]],
    last: tuple[str, ...],
    encoders: Mapping[str, str] | None = None,
    component: str = COMPONENT,
) -> Blocks:
    """The blocks of a transformer: an encoder each (component -> label), IN, the numbered ones, OUT.

    `series` is prefix of the diffusers names -> (letter, count), in model order; names that begin with one of `last`
    are OUT, all others IN. Lists of values are for the numbered blocks or for all.
    """
    encoders = encoders or {}
    every = [label for letter, count in series.values() for label in numbered(letter, 0, count - 1)]
    labels = (*dict.fromkeys(encoders.values()), "IN", *every, "OUT")
    return Blocks(
        labels=labels,
        spans=(
            *(Span(name, "hf", "", label) for name, label in encoders.items()),
            *(Span(component, "diffusers", prefix, f"{letter}{{}}") for prefix, (letter, _) in series.items()),
            *(Span(component, "diffusers", prefix, "OUT") for prefix in last),
            Span(component, "diffusers", "", "IN"),
        ),
        lists=(tuple(every), labels),
    )
