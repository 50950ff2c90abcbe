"""kohya: what sd-scripts writes. Flattened names, `lora_down` / `lora_up`, alpha as a 0-d tensor; LyCORIS on top.

WebUI (A1111), Forge and their kin write no spelling of their own: `a1111` is another name of this one.
"""

from __future__ import annotations

from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.layouts._flattened import Flattened
from loratool.layouts._suffixes import ALIASES, LYCORIS


class Kohya(Flattened):
    """The flattened spelling of sd-scripts."""

    def rewrite(self, key: str) -> str:
        """diffusers' `--output_kohya_format` writes `..._to_k_lora.down.weight` for `..._to_k.lora_down.weight`."""
        key = super().rewrite(key)
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
    spelling=LYCORIS,
    aliases=ALIASES,
    names=("a1111", "webui", "forge", "sd-scripts"),
)
