"""comfyui: dotted native names behind `diffusion_model.` and `text_encoders.`, `lora_A` / `lora_B`, alpha beside them.

ComfyUI itself, ai-toolkit, musubi-tuner and others write it. ComfyUI takes `lora_down` / `lora_up` as well, and
looks for a Tucker core only beside those: a module with `mid` is spelled so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.layout import ALPHA, ANY, MAGNITUDE, Layout, Parsed
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor
from loratool.layouts._peft_config import without_adapter_name

_KOHYA_PAIR = {"up": ".lora_up.weight", "down": ".lora_down.weight", "mid": ".lora_mid.weight"}


class Comfyui(Layout):
    """The dotted native spelling."""

    def rewrite(self, key: str) -> str:
        """ComfyUI's other ways to write a suffix: `to_q_lora.up.weight` and `lora_B.default.weight`."""
        if key.endswith(("_lora.down.weight", "_lora.up.weight")):
            stem, _, rest = key.rpartition("_lora.")
            return f"{stem}.lora.{rest}"
        return without_adapter_name(key)

    def parse(self, keys: Sequence[str]) -> Parsed:
        """`diff_b` beside a LoRA pair is that pair's bias; alone it is an adapter of its own."""
        parsed = super().parse(keys)
        for group in parsed.groups.values():
            diff = group.by_family.get("diff", {})
            if "diff_b" in diff and "up" in group.by_family.get("lora", {}):
                group.by_family["lora"]["bias"] = diff.pop("diff_b")
                if not diff:
                    del group.by_family["diff"]
        return parsed

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """ComfyUI adds `diff_b` as it is: where alpha / rank is not 1, it is no bias of the pair and stays an extra."""
        modules, extras = [], dict(adapter.extras)
        for module in adapter.modules:
            key = module.keys.get("bias", "")
            if key.endswith(".diff_b") and module.scale != 1.0:
                extras[key] = module.factors["bias"]
                module = replace(
                    module,
                    factors={role: f for role, f in module.factors.items() if role != "bias"},
                    keys={role: k for role, k in module.keys.items() if role != "bias"},
                )
            modules.append(module)
        return replace(adapter, modules=tuple(modules), extras=extras)

    def suffix(self, module: Module, role: str) -> str:
        """As in the table, but a Tucker module's pair is spelled as ComfyUI expects it beside `lora_mid`."""
        if role == "bias":
            return ".diff_b"
        return _KOHYA_PAIR[role] if "mid" in module.factors else super().suffix(module, role)

    def obstacle(self, module: Module) -> str | None:
        """ComfyUI adds a bias (`diff_b`) without alpha / rank: it is right only at scale 1."""
        if "bias" in module.factors and module.scale != 1.0:
            return "comfyui scales a lora_bias by 1 and not by alpha / rank"
        return super().obstacle(module)

    def alpha_tensor(self, module: Module) -> LazyTensor | None:
        """None at scale 1: ComfyUI takes an absent alpha as the rank."""
        return None if module.scale == 1.0 else super().alpha_tensor(module)


_SPELLING: Mapping[tuple[str, str], str] = {
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up"): ".lora_B.weight",
    ("lora", "mid"): ".lora_mid.weight",
    ("lora", "bias"): ".lora_B.bias",  # what is read; ComfyUI itself wants `diff_b`: see `suffix`
    **{("lokr", role): f".lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    (ANY, ALPHA): ".alpha",
    (ANY, MAGNITUDE): ".dora_scale",
}

LAYOUT = Comfyui(
    id="comfyui",
    title="ComfyUI (native names)",
    separator=".",
    spelling=_SPELLING,
    aliases={
        ".lora_down.weight": ("lora", "down"),
        ".lora_up.weight": ("lora", "up"),
        ".lora_A": ("lora", "down"),
        ".lora_B": ("lora", "up"),
        ".lora.down.weight": ("lora", "down"),
        ".lora.up.weight": ("lora", "up"),
        ".lora_linear_layer.down.weight": ("lora", "down"),
        ".lora_linear_layer.up.weight": ("lora", "up"),
        ".lora_magnitude_vector": (ANY, MAGNITUDE),
        **{f".hada_{role}": ("loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        ".diff": ("diff", "diff"),
        ".diff_b": ("diff", "diff_b"),
    },
)
