"""kohya: what sd-scripts writes. Flattened names, `lora_down` / `lora_up`, alpha as a 0-d tensor; LyCORIS on top.

WebUI (A1111), Forge and their kin write no spelling of their own: `a1111` is another name of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture, Resolver, Spoken
from loratool.layouts._flattened import Flattened
from loratool.layouts._lycoris import IA3
from loratool.layouts._suffixes import ALIASES, LYCORIS

_OFT_PREFIX, _PREFIX = "oft_unet_", "lora_unet_"


class Kohya(Flattened):
    """The flattened spelling."""

    def prefixes(self, architecture: Architecture) -> tuple[str, ...]:
        """sd-scripts' own OFT has one more."""
        prefixes = super().prefixes(architecture)
        return (*prefixes, _OFT_PREFIX) if _PREFIX in prefixes else prefixes

    def rewrite(self, key: str) -> str:
        """diffusers' `--output_kohya_format` writes `..._to_k_lora.down.weight` for `..._to_k.lora_down.weight`."""
        if key.endswith(("_lora.down.weight", "_lora.up.weight")):
            stem, _, rest = key.rpartition("_lora.")
            return f"{stem}.lora_{rest}"
        return key

    def resolver(self, architecture: Architecture, metadata: Mapping[str, str]) -> Resolver:
        """sd-scripts' own OFT has `oft_unet_` where everybody else has `lora_unet_`. Written is the latter."""
        usual = super().resolver(architecture, metadata)

        def resolve(stem: str) -> Sequence[Spoken]:
            if not stem.startswith(_OFT_PREFIX):
                return usual(stem)
            found = usual(_PREFIX + stem[len(_OFT_PREFIX) :])
            return [said._replace(voice=said.voice._replace(prefix=_OFT_PREFIX)) for said in found]

        return resolve

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """sd-scripts' `split_qkv` makes the parts block-diagonal and leaves alpha as it was: said, not corrected."""
        if '"split_qkv": "true"' in adapter.metadata.get("ss_network_args", "").lower():
            note = (
                "trained with split_qkv: sd-scripts stores fused modules at a multiple of the rank, alpha unchanged, "
                "so programs apply them that much weaker than in training; the file is taken as programs apply it"
            )
            return replace(adapter, notes=(*adapter.notes, note))
        if adapter.metadata.get("ss_network_module", "").endswith("dylora"):
            note = "trained as a DyLoRA: its first ranks are a LoRA by themselves, which convert --unpack N takes out"
            return replace(adapter, notes=(*adapter.notes, note))
        return adapter


LAYOUT = Kohya(
    id="kohya",
    title="kohya (sd-scripts, LyCORIS)",
    separator="_",
    spelling={**LYCORIS, **IA3},
    aliases=ALIASES,
    names=("a1111", "webui", "forge", "sd-scripts"),
)
