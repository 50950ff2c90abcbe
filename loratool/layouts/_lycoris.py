"""The suffixes of LyCORIS' families, which kohya's layout and ComfyUI's share."""

from __future__ import annotations

from collections.abc import Mapping

LOKR: Mapping[tuple[str, str], str] = {
    ("lokr", role): f".lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
}
LOHA: Mapping[tuple[str, str], str] = {
    ("loha", role): f".hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
}
FULL: Mapping[tuple[str, str], str] = {
    ("diff", "diff"): ".diff",
    ("diff", "bias"): ".diff_b",
    ("diff", "w_norm"): ".w_norm",
}
BESIDE_NORM = ".b_norm"
"""The suffix of a bias beside `w_norm`."""

WEIGHT_CHANGING: Mapping[tuple[str, str], str] = {
    **{("glora", role): f".{role}.weight" for role in ("a1", "a2", "b1", "b2", "bm")},
    # BOFT's suffixes are OFT's: reading, OFT comes last and wins, and the shape tells (`Layout.meant`).
    **{(family, "blocks"): ".oft_blocks" for family in ("boft", "oft")},
    **{(family, "rescale"): ".rescale" for family in ("boft", "oft")},
    **{(family, "constraint"): ".alpha" for family in ("boft", "oft")},
    ("oft", "diag"): ".oft_diag",
}
IA3: Mapping[tuple[str, str], str] = {
    ("ia3", "input"): ".weight",
    ("ia3", "output"): ".weight",
    ("ia3", "on_input"): ".on_input",
}
