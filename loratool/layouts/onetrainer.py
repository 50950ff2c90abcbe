"""onetrainer: what OneTrainer wrote for years and calls its legacy format. A mixture of diffusers' module paths,
flattened, with kohya's suffixes, behind `lora_transformer_`, `lora_unet_` and `lora_te1_`, `lora_te2_`, ...

A model with one text encoder of its own has `lora_te_`. alpha stands beside the factors, a DoRA magnitude is by default
per input column. Bundled embeddings (`bundle_emb.*`) are extras. Its dotted format is the layout `omi`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool.core.architecture import Architecture, Voice
from loratool.core.layout import Voices
from loratool.layouts._derived import distinct, written
from loratool.layouts._flattened import Flattened
from loratool.layouts._lycoris import IA3
from loratool.layouts._suffixes import ALIASES, LYCORIS

_PREFIXES = {"transformer": "lora_transformer_", "unet": "lora_unet_", "prior": "lora_prior_unet_"}
_ENCODER = "text_encoder"


def _voices(architecture: Architecture) -> Voices:
    if architecture.open:
        return {}
    spoken = written(architecture, "diffusers")
    encoders = [component for component in spoken if component.startswith(_ENCODER)]
    found: dict[str, tuple[Voice, ...]] = {}
    for component, voice in spoken.items():
        if component in _PREFIXES:
            found[component] = (Voice(_PREFIXES[component], voice.naming),)
        elif component in encoders:
            number = component.removeprefix(_ENCODER).strip("_") or "1"
            numbered = Voice(f"lora_te{number}_", voice.naming)
            alone = Voice("lora_te_", voice.naming) if len(encoders) == 1 else None
            found[component] = distinct(alone, numbered)
    return found


class Onetrainer(Flattened):
    """The mixture."""

    def signed(self, metadata: Mapping[str, str]) -> bool:
        """OneTrainer's own header entries begin with `ot_`."""
        return any(key.startswith("ot_") for key in metadata)


LAYOUT = Onetrainer(
    id="onetrainer",
    title="OneTrainer (legacy mixture)",
    separator="_",
    spelling={**LYCORIS, **IA3},
    aliases=ALIASES,
    derive=_voices,
)
