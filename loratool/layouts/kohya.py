"""kohya: what sd-scripts writes. Flattened names, `lora_down` / `lora_up`, alpha as a 0-d tensor; LyCORIS on top.

WebUI (A1111), Forge and their kin write no spelling of their own: `a1111` is another name of this one.
"""

from __future__ import annotations

from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.layout import ALPHA, ANY, MAGNITUDE
from loratool.layouts._flattened import Flattened

_SUPPORTED = {
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

_ALIASES = {
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    ".lora.up.weight": ("lora", "up"),
    ".lora_linear_layer.down.weight": ("lora", "down"),
    ".lora_linear_layer.up.weight": ("lora", "up"),
    ".lora_magnitude_vector": (ANY, MAGNITUDE),
    # Families without a plug-in: their keys are recognised, named in the report, and travel as extras.
    **{f".hada_{role}": ("loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".{role}.weight": ("glora", role) for role in ("a1", "a2", "b1", "b2")},
    **{suffix: ("diff", suffix[1:]) for suffix in (".diff", ".diff_b", ".w_norm", ".b_norm")},
    ".oft_blocks": ("oft", "blocks"),
    ".on_input": ("ia3", "on_input"),
    ".weight": ("ia3", "weight"),
}


class Kohya(Flattened):
    """The flattened spelling."""

    def rewrite(self, key: str) -> str:
        """diffusers' `--output_kohya_format` writes `..._to_k_lora.down.weight` for `..._to_k.lora_down.weight`."""
        if key.endswith(("_lora.down.weight", "_lora.up.weight")):
            stem, _, rest = key.rpartition("_lora.")
            return f"{stem}.lora_{rest}"
        return key

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """sd-scripts' `split_qkv` makes the parts block-diagonal and leaves alpha as it was: said, not corrected."""
        if '"split_qkv": "true"' in adapter.metadata.get("ss_network_args", "").lower():
            note = (
                "trained with split_qkv: sd-scripts stores fused modules at a multiple of the rank, alpha unchanged, "
                "so programs apply them that much weaker than in training; the file is taken as programs apply it"
            )
            return replace(adapter, notes=(*adapter.notes, note))
        return adapter


LAYOUT = Kohya(
    id="kohya",
    title="kohya (sd-scripts, LyCORIS)",
    separator="_",
    spelling=_SUPPORTED,
    aliases=_ALIASES,
    names=("a1111", "webui", "forge", "sd-scripts"),
)
