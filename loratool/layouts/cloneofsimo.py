"""cloneofsimo: the first LoRA files for Stable Diffusion (`lora_diffusion`, early 2023). Read only.

Keys number the modules in the order in which the model's modules were traversed (`unet:3:up`); the header lists
the classes that were visited, and has an entry `<token>` = `<embed>` for each learned embedding. No alpha: scale 1.

Before that its files were pickled lists without any names, up and down in turn (`0`, `1`, ...), one file for each
component. Then the number of modules tells which component it is and which classes were visited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache

from loratool.core.architecture import Architecture, Resolver, Spoken
from loratool.core.layout import Layout, Parsed

_KEY = re.compile(r"^(unet|text_encoder):(\d+):(up|down)$")
_STEM = re.compile(r"^(unet|text_encoder):(\d+)$")
_LISTED = re.compile(r"^\d{1,6}$")
_LISTED_STEM = re.compile(r"^(?:(\d+) modules: )?(\d{1,6})$")
_BLOCK = re.compile(r"^(down|up|mid)_block(?:s\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.(.+)$")

# Position of a layer inside one transformer block, as diffusers registered them then: attn1, ff, attn2.
_INSIDE = {
    path: position
    for position, path in enumerate(
        [
            *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
            "ff.net.0.proj",
            *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        ]
    )
}
_CLIP = re.compile(r"^text_model\.encoder\.layers\.(\d+)\.self_attn\.(\w+)$")
_CLIP_INSIDE = {"k_proj": 0, "v_proj": 1, "q_proj": 2, "out_proj": 3}

_ATTENTION = {"CrossAttention", "Attention"}
_LISTS = (("unet", '["CrossAttention", "Attention", "GEGLU"]'), ("unet", '["CrossAttention"]'), ("text_encoder", ""))
_KNOWN = {"unet": _ATTENTION | {"GEGLU"}, "text_encoder": {"CLIPAttention"}}


class Cloneofsimo(Layout):
    """Numbered modules."""

    def split(self, key: str) -> tuple[str, str, str] | None:
        """`unet:3:up` is the up factor of module 3 of the UNet, `6` that of module 3 of a list."""
        if _LISTED.match(key):
            return str(int(key) // 2), "lora", ("up", "down")[int(key) % 2]
        match = _KEY.match(key)
        return None if match is None else (f"{match[1]}:{match[2]}", "lora", match[3])

    def prefixes(self, architecture: Architecture) -> tuple[str, ...]:
        """A list has none."""
        return ("",) if super().prefixes(architecture) else ()

    def parse(self, keys: Sequence[str]) -> Parsed:
        """The stems of a list have its length in front: without it they say nothing."""
        parsed = super().parse(keys)
        if not all(map(_LISTED.match, keys)):
            return parsed
        return parsed._replace(groups={f"{len(parsed.groups)} modules: {n}": one for n, one in parsed.groups.items()})

    def resolver(self, architecture: Architecture, metadata: Mapping[str, str]) -> Resolver:
        """The module at that position of the traversal, if the classes that were visited are known ones."""

        def resolve(stem: str) -> Sequence[Spoken]:
            match = _LISTED_STEM.match(stem)
            if match is not None:
                return _listed(architecture.whole, int(match[2]), match[1] and int(match[1]))
            match = _STEM.match(stem)
            if match is None:
                return ()
            spoken = _traversal(architecture.whole, match[1], metadata.get(match[1], ""))
            index = int(match[2])
            return [spoken[index]] if index < len(spoken) else ()

        return resolve


def _listed(architecture: Architecture, index: int, count: int | str | None) -> Sequence[Spoken]:
    """Module `index` of a list of `count` modules (None: any number), if a traversal visits as many."""
    for component, visited in _LISTS:
        spoken = _traversal(architecture, component, visited)
        if index < len(spoken) and count in (None, len(spoken)):
            return [spoken[index]]
    return ()


@cache
def _traversal(architecture: Architecture, component: str, visited: str) -> Sequence[Spoken]:
    """The modules of a component in order of traversal; `visited` is the header's JSON list of classes."""
    voice = dict(architecture.voices(LAYOUT.id)).get(component)
    if voice is None:
        return ()
    try:
        classes = set(json.loads(visited)) if visited else _KNOWN[component]
    except (ValueError, TypeError):
        return ()
    if not classes <= _KNOWN[component]:
        return ()
    place = _unet_place if component == "unet" else _clip_place
    naming = architecture.naming(component, voice.naming)
    placed = sorted((at, name) for name in naming if (at := place(name, classes)) is not None)
    return [Spoken(component, voice, name, naming[name]) for _, name in placed]


def _unet_place(name: str, classes: set[str]) -> tuple[int, ...] | None:
    """Where a UNet layer comes in the traversal: down, up, and mid last."""
    match = _BLOCK.match(name)
    if match is None or match[5] not in _INSIDE:
        return None
    wanted = "GEGLU" in classes if match[5].startswith("ff") else bool(classes & _ATTENTION)
    if not wanted:
        return None
    stage = ("down", "up", "mid").index(match[1])
    return stage, int(match[2] or 0), int(match[3]), int(match[4]), _INSIDE[match[5]]


def _clip_place(name: str, classes: set[str]) -> tuple[int, ...] | None:
    """Where a text encoder's layer comes in the traversal."""
    match = _CLIP.match(name)
    return None if match is None or match[2] not in _CLIP_INSIDE else (int(match[1]), _CLIP_INSIDE[match[2]])


LAYOUT = Cloneofsimo(
    id="cloneofsimo",
    title="cloneofsimo (lora_diffusion)",
    separator=".",
    spelling={("lora", "up"): ":up", ("lora", "down"): ":down"},
    writable=False,
)
