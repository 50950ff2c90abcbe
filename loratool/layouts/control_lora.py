"""control-lora: Stability AI's Control-LoRAs, a ControlNet as updates of the UNet's encoder. Read only.

Keys are `input_blocks.1.1.transformer_blocks.0.attn1.to_q.down` and `.up`.
The marker `lora_controlnet`, zero convolutions, the hint's blocks, norms and biases are tensors of their own: extras.
"""

from __future__ import annotations

from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.layout import Layout, Voices
from loratool.layouts._derived import renamed, written

WHOLE = "ControlNet"
"""The family of its tensors that are no updates: a kind without a plug-in, whose tensors are extras."""


def _voices(architecture: Architecture) -> Voices:
    voice = renamed(written(architecture, "comfyui").get("unet"), "")
    return {} if architecture.open or voice is None else {"unet": (voice,)}


class ControlLora(Layout):
    """Pairs without `.weight`."""

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """What it is, said: no program applies it to the UNet itself."""
        note = "a Control-LoRA: its updates are for a ControlNet, a copy of the UNet's encoder, not for the UNet"
        return replace(adapter, notes=(*adapter.notes, note))


LAYOUT = ControlLora(
    id="control-lora",
    title="Stability AI Control-LoRA",
    separator=".",
    spelling={("lora", "down"): ".down", ("lora", "up"): ".up"},
    aliases={".weight": (WHOLE, "weight"), ".bias": (WHOLE, "bias")},
    writable=False,
    derive=_voices,
)
