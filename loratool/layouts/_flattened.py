"""Flattened names: every dot of the model's name is an underscore. Shared by the layouts that write them."""

from __future__ import annotations

from loratool.core.layout import Layout

_DOUBLED = "lora_unet__"


def single_underscore(key: str) -> str:
    """Wan-Fun, and others with a model in a module without a name, write `lora_unet__blocks_0` for
    `lora_unet_blocks_0`."""
    return _DOUBLED[:-1] + key[len(_DOUBLED) :] if key.startswith(_DOUBLED) else key


class Flattened(Layout):
    """A layout of flattened names."""

    def rewrite(self, key: str) -> str:
        """See `single_underscore`."""
        return single_underscore(key)

    def split(self, key: str) -> tuple[str, str, str] | None:
        """As every layout, but only for flattened names: a stem with dots is another program's spelling."""
        stem, dot, rest = self.rewrite(key).partition(".")
        meaning = self.suffixes.get(dot + rest)
        return (stem, *meaning) if meaning is not None and stem else None
