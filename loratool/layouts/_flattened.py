"""Flattened names: every dot of the model's name is an underscore. Shared by the layouts that write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.core.architecture import Architecture, Resolver, Spoken
from loratool.core.layout import Layout, Parsed
from loratool.core.module import Module
from loratool.layouts._lycoris import BESIDE_NORM

_DOUBLED = "lora_unet__"


def single_underscore(stem: str) -> str:
    """Wan-Fun, and others with a model in a module without a name, write `lora_unet__blocks_0` for
    `lora_unet_blocks_0`."""
    return _DOUBLED[:-1] + stem[len(_DOUBLED) :] if stem.startswith(_DOUBLED) else stem


class Flattened(Layout):
    """A layout of flattened names."""

    def split(self, key: str) -> tuple[str, str, str] | None:
        """As every layout, but only for flattened names: a stem with dots is another program's spelling."""
        stem, dot, rest = self.rewrite(key).partition(".")
        meaning = self.suffixes.get(dot + rest)
        return (stem, *meaning) if meaning is not None and stem else None

    def resolver(self, architecture: Architecture, metadata: Mapping[str, str]) -> Resolver:
        """With two underscores where the model's table does not know them; see `single_underscore`."""
        plain = super().resolver(architecture, metadata)

        def resolve(stem: str) -> Sequence[Spoken]:
            found = plain(stem)
            return plain(single_underscore(stem)) if not found and stem.startswith(_DOUBLED) else found

        return resolve

    def parse(self, keys: Sequence[str]) -> Parsed:
        """A `.weight` is IA3's only beside its flag; without it, it is a tensor that nobody knows."""
        parsed = super().parse(keys)
        strays = [
            stem
            for stem, group in parsed.groups.items()
            if "ia3" in group.by_family and group.by_family["ia3"].keys() == {"output"}
        ]
        if not strays:
            return parsed
        unknown = list(parsed.unknown)
        groups = dict(parsed.groups)
        for stem in strays:
            unknown += groups[stem].by_family.pop("ia3").values()
            if not groups[stem].by_family and not groups[stem].shared:
                del groups[stem]
        return Parsed(groups, tuple(unknown))

    def suffix(self, module: Module, role: str) -> str:
        """As in the table, but a norm's bias has a name of its own."""
        return BESIDE_NORM if role == "bias" and "w_norm" in module.factors else super().suffix(module, role)
