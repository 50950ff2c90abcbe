"""ai-toolkit: what Ostris' ai-toolkit writes for transformers. Dotted names, `lora_A` / `lora_B` and no alpha, since it
trains with alpha at the rank; a LoKr has one.

FLUX.1, SD3 and a few others of their time: diffusers' names behind `transformer.`. Newer models: the names of the model
code it trains with, behind `diffusion_model.`, most often those that ComfyUI has. Its UNets are spelled as kohya's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from loratool.core.architecture import Architecture
from loratool.core.layout import ANY, MAGNITUDE, Layout, Voices
from loratool.core.module import Module
from loratool.core.scale import TAKE_SCALE, all_at_scale, stuck
from loratool.core.tensor import LazyTensor
from loratool.layouts._derived import distinct, main_component, renamed, written
from loratool.layouts._suffixes import WITH_A_AND_B

_TRANSFORMER, _NATIVE = "transformer.", "diffusion_model."
_OLD = frozenset({"flux", "sd3", "lumina2", "pixart", "auraflow"})
"""Models that it trains in diffusers' class and saves as they are."""

_DIFFUSERS_NAMES = frozenset({"z-image"})
"""Models that it trains in diffusers' class and saves behind ComfyUI's prefix."""


def _voices(architecture: Architecture) -> Voices:
    main = main_component(architecture)
    if main is None or main == "unet":
        return {}
    split, native = (written(architecture, layout).get(main) for layout in ("diffusers", "comfyui"))
    old, new = renamed(split, _TRANSFORMER), renamed(native, _NATIVE)
    if architecture.id in _DIFFUSERS_NAMES:
        new = renamed(split, _NATIVE)
    voices = distinct(old, new) if architecture.id in _OLD else distinct(new, old)
    return {main: voices} if voices else {}


class AiToolkit(Layout):
    """The dotted spelling without alpha."""

    def signed(self, metadata: Mapping[str, str]) -> bool:
        """`software` says who wrote the file."""
        try:
            software = json.loads(metadata.get("software", "null"))
        except (ValueError, RecursionError):
            return False
        return isinstance(software, dict) and software.get("name") == "ai-toolkit"

    def obstacle(self, module: Module) -> str | None:
        """There is no alpha beside a pair: its scale goes into the factors."""
        reason = stuck(module, 1.0) if module.family.id == "lora" else None
        return f"{self.id} keeps no alpha, and {reason}" if reason else super().obstacle(module)

    def ready(self, modules: Sequence[Module]) -> tuple[Module, ...]:
        """Pairs at scale 1."""
        pairs = [module for module in modules if module.family.id == "lora"]
        done = iter(all_at_scale(pairs, lambda module: 1.0))
        return tuple(next(done) if module.family.id == "lora" else module for module in modules)

    def way_out(self, blocked: Sequence[Module]) -> str | None:
        """Wider factors can take any scale."""
        return TAKE_SCALE if any(stuck(module, 1.0) for module in blocked) else super().way_out(blocked)

    def alpha_tensor(self, module: Module) -> LazyTensor | None:
        """Only beside a LoKr."""
        return None if module.family.id == "lora" else super().alpha_tensor(module)


LAYOUT = AiToolkit(
    id="ai-toolkit",
    title="ai-toolkit",
    separator=".",
    spelling={key: suffix for key, suffix in WITH_A_AND_B.items() if key not in {("lora", "mid"), (ANY, MAGNITUDE)}},
    aliases={".lora_down.weight": ("lora", "down"), ".lora_up.weight": ("lora", "up")},
    header_entries=("software",),
    derive=_voices,
)
