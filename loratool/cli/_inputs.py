"""Inputs with strengths on the command line: `A:0.7 B:0.3`, `--weights`, `--blocks`, and prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.core.errors import UsageError

if TYPE_CHECKING:
    from loratool.ops.inputs import Asked


def asked_for(inputs: Sequence[str], weights: str | None, blocks: Sequence[str]) -> list[Asked]:
    """The inputs of a command line with their strengths and block weights. Raises UsageError for what does not fit."""
    from loratool.ops.inputs import Asked

    split = [_split(text) for text in inputs]
    listed = _listed(weights, len(inputs))
    if len(blocks) not in (0, 1, len(inputs)):
        raise UsageError(
            f"{len(blocks)} times --blocks for {_inputs(len(inputs))}", hint="give one for all of them, or one for each"
        )
    specs = [blocks[index % len(blocks)] if blocks else None for index in range(len(inputs))]
    asked = []
    for (path, own), other, spec in zip(split, listed, specs, strict=True):
        if own is not None and other is not None:
            raise UsageError(f"has the weight {own:g} of its own and {other:g} from --weights", file=path)
        weight = own if own is not None else other
        if weight is not None and not math.isfinite(weight):
            raise UsageError(f"its strength is {weight:g}, expected a finite number", file=path)
        asked.append(Asked(path, 1.0 if weight is None else weight, spec))
    return asked


def _split(text: str) -> tuple[str, float | None]:
    """`A:0.7` as A and 0.7; what exists under the whole name is a path, colons and all."""
    path, colon, suffix = text.rpartition(":")
    if not colon or not path or os.path.lexists(text):
        return text, None
    if "/" in suffix or os.sep in suffix or suffix.lower().endswith(".safetensors"):
        return text, None  # a path that is not there: opening it will say so
    try:
        return path, float(suffix)
    except ValueError:
        raise UsageError(
            f"{suffix!r} behind the colon is no number, and no file is called that", file=text, hint="write A:0.7"
        ) from None


def _listed(weights: str | None, count: int) -> list[float | None]:
    """The numbers of `--weights`, one for each input; an empty one is not given."""
    if weights is None:
        return [None] * count
    if not count:
        raise UsageError("--weights without a LoRA file that it is for", hint="in a prompt every LoRA has its own")
    texts = [text.strip() for text in weights.split(",")]
    if len(texts) != count:
        number = f"{len(texts)} weight{'s' if len(texts) > 1 else ''}"
        raise UsageError(f"--weights names {number} for {_inputs(count)}", hint="write one for each, as 0.7,0.3")
    try:
        return [float(text) if text else None for text in texts]
    except ValueError:
        raise UsageError(f"--weights is {weights!r}, expected numbers as in 0.7,0.3") from None


def files_of(blocks: Sequence[str]) -> list[str]:
    """The files among the arguments of `--blocks`."""
    return [spec for spec in blocks if os.path.exists(spec)]


def _inputs(count: int) -> str:
    return f"{count} input{'s' if count > 1 else ''}"


def asked_in(prompt: str) -> list[Asked]:
    """The LoRAs of a WebUI prompt, found by name, with their strengths."""
    from loratool.ops.inputs import Asked
    from loratool.ops.prompt import find_lora, loras_in

    found = []
    for one in loras_in(prompt):
        blocks = None
        if one.strength is None:  # the text encoders have a strength of their own
            blocks = {"entries": [["text_encoder*", one.text_encoder]], "rest": one.unet}
        found.append(Asked(find_lora(one.name), 1.0 if one.strength is None else one.strength, blocks))
    if not found:
        raise UsageError("--prompt names no LoRA", hint="write it as in WebUI: a portrait <lora:name:0.8>")
    return found
