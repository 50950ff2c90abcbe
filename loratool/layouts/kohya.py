"""kohya: what sd-scripts writes. Flattened names, `lora_down` / `lora_up`, alpha as a 0-d tensor; LyCORIS on top.

WebUI (A1111), Forge and their kin write no spelling of their own: `a1111` is another name of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture, Spoken
from loratool.core.layout import ALPHA, ANY, MAGNITUDE, Layout, Parsed
from loratool.core.module import Module
from loratool.layouts._flattened import single_underscore
from loratool.layouts._lycoris import BESIDE_NORM, FULL, IA3, LOHA, LOKR, WEIGHT_CHANGING

_SUPPORTED = {
    ("lora", "down"): ".lora_down.weight",
    ("lora", "up"): ".lora_up.weight",
    ("lora", "mid"): ".lora_mid.weight",
    **LOKR,
    **LOHA,
    **IA3,
    **WEIGHT_CHANGING,
    **FULL,
    ("set", "weight"): ".set_weight",
    (ANY, ALPHA): ".alpha",  # behind OFT's constraint, which has the same suffix
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
    BESIDE_NORM: ("diff", "bias"),
    # A family without a plug-in: its keys are recognised, named in the report, and travel as extras.
    **{f".bias_{role}": ("sparse bias", role) for role in ("indices", "values", "size")},
}

_OFT_PREFIX, _PREFIX = "oft_unet_", "lora_unet_"


class Kohya(Layout):
    """The flattened spelling."""

    def rewrite(self, key: str) -> str:
        """diffusers' `--output_kohya_format` writes `..._to_k_lora.down.weight` for `..._to_k.lora_down.weight`."""
        key = single_underscore(key)
        if key.endswith(("_lora.down.weight", "_lora.up.weight")):
            stem, _, rest = key.rpartition("_lora.")
            return f"{stem}.lora_{rest}"
        return key

    def split(self, key: str) -> tuple[str, str, str] | None:
        """As every layout, but only for flattened names: a stem with dots is another program's spelling."""
        stem, dot, rest = self.rewrite(key).partition(".")
        meaning = self.suffixes.get(dot + rest)
        return (stem, *meaning) if meaning is not None and stem else None

    def parse(self, keys: Sequence[str]) -> Parsed:
        """A `.weight` is IA3's only beside its flag; without it, it is a tensor that nobody knows."""
        parsed = super().parse(keys)
        strays = [
            stem
            for stem, group in parsed.groups.items()
            if group.by_family.get("ia3", {"on_input": ""}).keys() == {"output"}
        ]
        unknown = list(parsed.unknown)
        groups = dict(parsed.groups)
        for stem in strays:
            unknown += groups[stem].by_family.pop("ia3").values()
            if not groups[stem].by_family and not groups[stem].shared:
                del groups[stem]
        return Parsed(groups, tuple(unknown))

    def resolve(self, stem: str, architecture: Architecture, metadata: Mapping[str, str]) -> Sequence[Spoken]:
        """sd-scripts' own OFT has `oft_unet_` where everybody else has `lora_unet_`. Written is the latter."""
        if not stem.startswith(_OFT_PREFIX):
            return super().resolve(stem, architecture, metadata)
        found = super().resolve(_PREFIX + stem[len(_OFT_PREFIX) :], architecture, metadata)
        return [replace(said, voice=replace(said.voice, prefix=_OFT_PREFIX)) for said in found]

    def suffix(self, module: Module, role: str) -> str:
        """As in the table, but a norm's bias has a name of its own."""
        return BESIDE_NORM if role == "bias" and "w_norm" in module.factors else super().suffix(module, role)

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
    spelling=_SUPPORTED,
    aliases=_ALIASES,
    names=("a1111", "webui", "forge", "sd-scripts"),
)
