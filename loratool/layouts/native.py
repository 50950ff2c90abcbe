"""native: the model's own names with nothing in front. Read only.

Black Forest Labs' control LoRAs are spelled so, and OneTrainer's format ORIGINAL.
`lora_A` / `lora_B`, with a bias (`lora_B.bias`) and the norms' new scales (`query_norm.scale`) in control LoRAs; alpha
beside the factors in OneTrainer's.
"""

from __future__ import annotations

from loratool.core.architecture import Architecture
from loratool.core.layout import Layout, Voices
from loratool.layouts._derived import distinct, main_component, renamed, written
from loratool.layouts._peft_config import without_adapter_name
from loratool.layouts._suffixes import ALIASES, WITH_A_AND_B


def _voices(architecture: Architecture) -> Voices:
    main = main_component(architecture) or ""
    native, split = written(architecture, "comfyui").get(main), written(architecture, "diffusers").get(main)
    if native is None or (split is not None and split.naming == native.naming):
        return {}  # bare names of diffusers are diffusers'
    return {main: distinct(renamed(native, ""))}


class Native(Layout):
    """Bare native names."""

    def rewrite(self, key: str) -> str:
        """Without a leftover adapter name."""
        return without_adapter_name(key)


LAYOUT = Native(
    id="native",
    title="native names (BFL control LoRAs, OneTrainer's ORIGINAL)",
    separator=".",
    spelling={**WITH_A_AND_B, ("lora", "bias"): ".lora_B.bias", ("set", "weight"): ".scale"},
    aliases={**ALIASES, ".lora_down.weight": ("lora", "down"), ".lora_up.weight": ("lora", "up")},
    writable=False,
    derive=_voices,
)
