"""lycoris: what LyCORIS' own wrapper writes, without sd-scripts: SimpleTuner, older ai-toolkit. `lycoris_` in front of
diffusers' module paths, flattened; LyCORIS' suffixes. It wraps the one model that is trained: no text encoders."""

from __future__ import annotations

from loratool.core.architecture import Architecture
from loratool.core.layout import Voices
from loratool.layouts._derived import distinct, main_component, renamed, written
from loratool.layouts._flattened import Flattened
from loratool.layouts._lycoris import IA3
from loratool.layouts._suffixes import ALIASES, LYCORIS

_PREFIX = "lycoris_"


def _voices(architecture: Architecture) -> Voices:
    main = main_component(architecture)
    voices = distinct(renamed(written(architecture, "diffusers").get(main or ""), _PREFIX))
    return {main: voices} if main and voices else {}


LAYOUT = Flattened(
    id="lycoris",
    title="LyCORIS (its own wrapper)",
    separator="_",
    spelling={**LYCORIS, **IA3},
    aliases=ALIASES,
    derive=_voices,
)
