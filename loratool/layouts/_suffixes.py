"""Suffixes that several layouts share: those of LyCORIS' modules, which every trainer that flattens names has taken
over, and the two ways to call the halves of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.core.layout import ALPHA, ANY, MAGNITUDE
from loratool.layouts._lycoris import BESIDE_NORM, FULL, LOHA, LOKR, WEIGHT_CHANGING

Suffixes = Mapping[tuple[str, str], str]

LYCORIS: Suffixes = {
    ("lora", "down"): ".lora_down.weight",
    ("lora", "up"): ".lora_up.weight",
    ("lora", "mid"): ".lora_mid.weight",
    **LOKR,
    **LOHA,
    **WEIGHT_CHANGING,
    **FULL,
    ("set", "weight"): ".set_weight",
    (ANY, ALPHA): ".alpha",  # behind OFT's constraint, which has the same suffix
    (ANY, MAGNITUDE): ".dora_scale",
}
"""`lora_down` / `lora_up`, and what LyCORIS calls the factors of its other families."""

WITH_A_AND_B: Suffixes = {
    **LYCORIS,
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up"): ".lora_B.weight",
}
"""The same with PEFT's names of the halves."""

ALIASES: Mapping[str, tuple[str, str]] = {
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    ".lora.up.weight": ("lora", "up"),
    ".lora_linear_layer.down.weight": ("lora", "down"),
    ".lora_linear_layer.up.weight": ("lora", "up"),
    ".lora_magnitude_vector": (ANY, MAGNITUDE),
    BESIDE_NORM: ("diff", "bias"),
    # A family without a plug-in: its keys are recognised, named in the report, and travel as extras.
    **{f".bias_{role}": ("sparse bias", role) for role in ("indices", "values", "size")},
}
"""More suffixes that occur."""
