"""omi: OneTrainer's format of the Open Model Initiative. The model's own names, dotted, behind `transformer.`, `unet.`,
`clip_l.`, `clip_g.`, `t5.`; fused weights in numbered parts (`img_attn.qkv.0`); kohya's suffixes.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool.core.architecture import Architecture, Voice
from loratool.core.layout import Layout, Voices
from loratool.layouts._derived import main_component, written
from loratool.layouts._suffixes import ALIASES, LYCORIS

NAMING = "omi"
_ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5"}
"""What ComfyUI and what OMI call an encoder."""


def _voices(architecture: Architecture) -> Voices:
    main = main_component(architecture)
    naming = None if main is None else _naming(architecture, main)
    if main is None or naming is None:
        return {}
    found = {main: (Voice(f"{main}.", naming),)}
    for component, voice in written(architecture, "comfyui").items():
        name = _ENCODERS.get(voice.prefix.removeprefix("text_encoders.").partition(".")[0])
        if name is not None:
            found[component] = (Voice(f"{name}.", voice.naming),)
    return found


def _naming(architecture: Architecture, main: str) -> str | None:
    """The naming with numbered parts, where a table has one; a UNet's own names have nothing fused."""
    spoken = [voice.naming for component, voice in architecture.voices("comfyui") if component == main]
    return next((naming for naming in (NAMING, "ldm") if naming in spoken), None)


class Omi(Layout):
    """The dotted format."""

    def signed(self, metadata: Mapping[str, str]) -> bool:
        """OneTrainer's own header entries begin with `ot_`."""
        return any(key.startswith("ot_") for key in metadata)


LAYOUT = Omi(
    id="omi",
    title="OneTrainer (OMI)",
    separator=".",
    spelling=LYCORIS,
    aliases=ALIASES,
    derive=_voices,
)
