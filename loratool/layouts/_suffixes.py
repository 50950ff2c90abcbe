"""Suffixes that several layouts share: those of LyCORIS' modules, which every trainer that flattens names has taken
over, and the two ways to call the halves of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.core.layout import ALPHA, ANY, MAGNITUDE

Suffixes = Mapping[tuple[str, str], str]

LYCORIS: Suffixes = {
    ("lora", "down"): ".lora_down.weight",
    ("lora", "up"): ".lora_up.weight",
    ("lora", "mid"): ".lora_mid.weight",
    ("lokr", "w1"): ".lokr_w1",
    ("lokr", "w1_a"): ".lokr_w1_a",
    ("lokr", "w1_b"): ".lokr_w1_b",
    ("lokr", "w2"): ".lokr_w2",
    ("lokr", "w2_a"): ".lokr_w2_a",
    ("lokr", "w2_b"): ".lokr_w2_b",
    ("lokr", "t2"): ".lokr_t2",
    (ANY, ALPHA): ".alpha",
    (ANY, MAGNITUDE): ".dora_scale",
}
"""`lora_down` / `lora_up`, and what LyCORIS calls the factors of its other families."""

WITH_A_AND_B: Suffixes = {
    **LYCORIS,
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up"): ".lora_B.weight",
}
"""The same with PEFT's names of the halves."""

UNREAD: Mapping[str, tuple[str, str]] = {
    # Families without a plug-in: their keys are recognised, named in the report, and travel as extras.
    **{f".hada_{role}": ("loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".{role}.weight": ("glora", role) for role in ("a1", "a2", "b1", "b2")},
    **{suffix: ("diff", suffix[1:]) for suffix in (".diff", ".diff_b", ".w_norm", ".b_norm")},
    ".oft_blocks": ("oft", "blocks"),
    ".on_input": ("ia3", "on_input"),
    ".weight": ("ia3", "weight"),
}

ALIASES: Mapping[str, tuple[str, str]] = {
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    ".lora.up.weight": ("lora", "up"),
    ".lora_linear_layer.down.weight": ("lora", "down"),
    ".lora_linear_layer.up.weight": ("lora", "up"),
    ".lora_magnitude_vector": (ANY, MAGNITUDE),
    **UNREAD,
}
"""More suffixes that occur behind flattened names."""
