"""Prompt: the LoRAs that a Stable Diffusion WebUI prompt names, and their files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.core.errors import LoratoolError, UsageError
from loratool.files.checkpoint import WEIGHTS
from loratool.files.safetensors import read_header
from loratool.ops.places import Found, called, counted, did_you_mean, files_in, look_around, lora_places

_TAG = re.compile(r"<(lora|lyco):([^>]*)>")
_OUTPUT_NAME = "ss_output_name"
_FORM = "<lora:NAME:0.8>, or <lora:NAME:te=0.5:unet=0.8>"


@dataclass(frozen=True)
class PromptLora:
    """A LoRA in a prompt: its name, its strengths for the text encoders and the unet (or transformer), and the tag."""

    name: str
    text_encoder: float
    unet: float
    tag: str

    @property
    def strength(self) -> float | None:
        """The one strength for everything; None where they differ."""
        return self.unet if self.unet == self.text_encoder else None


def loras_in(prompt: str) -> list[PromptLora]:
    """The LoRAs of a prompt in order: `<lora:NAME:0.8>`, `<lora:NAME>` (1), `<lora:NAME:TE:UNET>`, `te=`, `unet=`.

    As in WebUI, `<lyco:...>` is the same, the unet takes the text encoder's strength unless it has its own, and tags of
    other kinds are nothing. Every tag counts, also a second one with the same name: WebUI and Forge apply both, so
    their strengths add up. (WebUI 1.x gives both the strength of the last; here, as in Forge, each keeps its own.)
    Raises UsageError, with the tag, for one without a name, for what is no finite number, and for arguments that
    cannot be followed (`dyn=`, those of extensions).
    """
    return [_lora(match[0], match[2]) for match in _TAG.finditer(prompt)]


def _lora(tag: str, arguments: str) -> PromptLora:
    items = [item.strip() for item in arguments.split(":")]
    named = dict(item.split("=", 1) for item in items[1:] if "=" in item)
    plain = [item for item in items[1:] if "=" not in item]
    if not items[0]:
        raise UsageError(f"{tag} names no LoRA", hint=f"write {_FORM}")
    unknown = [name for name in named if name not in ("te", "unet")]
    if unknown or len(plain) > 2:
        what = f"{unknown[0]}=" if unknown else repr(plain[2])
        hint = "only strengths are: resize the LoRA for a smaller rank, weigh its blocks by --blocks"
        raise UsageError(f"{tag}: {what} is not supported", hint=hint)
    text_encoder = _number(tag, named.get("te", plain[0] if plain else "1"))
    unet = named.get("unet", plain[1] if len(plain) > 1 else None)
    return PromptLora(items[0], text_encoder, text_encoder if unet is None else _number(tag, unet), tag)


def _number(tag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in text:
        raise UsageError(f"{tag}: {text!r} is no number", hint=f"write {_FORM}")
    return value


def find_lora(name: str, *, environ: Mapping[str, str] | None = None, home: Path | None = None) -> str:
    """The path of a LoRA that a prompt calls `name`: a file name without its suffix, with or without its folder.

    Looks in the folders of the config file, in those of WebUI, Forge, ComfyUI and StabilityMatrix with all folders
    below, and in the current folder. Where no file is called so, one whose header says it was trained under that name
    (`ss_output_name`) is taken. Raises LoratoolError where there is none or more than one.
    """
    places = lora_places(look_around(environ, home))
    files = list(files_in(places))
    # WebUI does not know suffixes: style.pt and style.safetensors are both `style`.
    readable = called(name, files)
    trained = {} if readable else _trained_as(files)
    readable = readable or [file for file in files if trained.get(file.path) == name]
    if len(readable) == 1:
        return str(readable[0].path)
    if readable:
        shown = ", ".join(str(file.path) for file in readable)
        hint = f"name its folder, too ({readable[0].path.parent.name}/{name}), or give the file itself"
        raise LoratoolError(f"the LoRA {name!r} could be any of {len(readable)} files: {shown}", hint=hint)
    near = did_you_mean(name, [*(file.stem for file in files), *trained.values()])
    looked = f"{counted(len(files), 'file')} in {', '.join(str(place.path) for place in places)}"
    raise LoratoolError(
        f"no LoRA is called {name!r}: looked at {looked}",
        hint=f"{near}give the file itself, or add its folder to `loras:` in the config file",
    )


def _trained_as(files: Sequence[Found]) -> dict[Path, str]:
    """The names under which files were trained; those that cannot be read have none."""
    names: dict[Path, str] = {}
    for file in files:
        if file.path.suffix.lower() == WEIGHTS:
            try:
                name = read_header(file.path).metadata.get(_OUTPUT_NAME)
            except LoratoolError:
                continue
            if name:
                names[file.path] = name
    return names
