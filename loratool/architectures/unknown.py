"""unknown: flattened names of a model without a table. They can be shown and kept, but no dots can be put back."""

from __future__ import annotations

from loratool.core.architecture import Architecture, Namings, Voice
from loratool.core.naming import Naming


def _nothing() -> Namings:
    return {"flat": Naming({})}


def _voice(prefix: str) -> Voice:
    return Voice(prefix, "flat")


_PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_",
    "text_encoder_1": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    "model": "lycoris_",
}

ARCHITECTURE = Architecture(
    id="unknown",
    title="an unknown model",
    components=dict.fromkeys(_PREFIXES, _nothing),
    writes={"kohya": {component: _voice(prefix) for component, prefix in _PREFIXES.items()}},
    reads={"kohya": {"model": (_voice("lora_"),)}},
    open=True,
)
