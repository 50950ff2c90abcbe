"""comfyui: dotted native names behind `diffusion_model.` and `text_encoders.`, `lora_A` / `lora_B`, alpha beside them.

ComfyUI itself, ai-toolkit, musubi-tuner and others write it. ComfyUI takes `lora_down` / `lora_up` as well, and
looks for a Tucker core only beside those: a module with `mid` is spelled so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture, Resolver, Spoken, Voice
from loratool.core.layout import ALPHA, ANY, MAGNITUDE, Layout, Parsed
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor
from loratool.layouts._lycoris import BESIDE_NORM, FULL, LOHA, LOKR, WEIGHT_CHANGING
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
            if "bias" in diff and "up" in group.by_family.get("lora", {}):
                group.by_family["lora"]["bias"] = diff.pop("bias")
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

    def resolver(self, architecture: Architecture, metadata: Mapping[str, str]) -> Resolver:
        """A parameter that is no module's `weight` goes by its own name in ComfyUI: `query_norm.scale`."""
        usual = super().resolver(architecture, metadata)

        def resolve(stem: str) -> Sequence[Spoken]:
            found = usual(stem)
            if found or architecture.open or not stem.endswith(_OWN_NAMES):
                return found
            whole = usual(stem.rpartition(".")[0])
            return [said for said in whole if _own_name(said.voice, said.name, said.component, architecture)]

        return resolve

    def stem(self, module: Module, architecture: Architecture, voices: Mapping[str, Voice]) -> str:
        """With the parameter's own name behind that of its module, where it has one."""
        stem, voice = super().stem(module, architecture, voices), voices[module.component]
        if module.family.id == "lora" or architecture.open:
            return stem
        name = stem[len(voice.prefix) :]
        return stem + (_own_name(voice, name, module.component, architecture) or "")

    def suffix(self, module: Module, role: str) -> str:
        """As in the table, but a Tucker module's pair is spelled as ComfyUI expects it beside `lora_mid`."""
        if role == "bias":
            return BESIDE_NORM if "w_norm" in module.factors else ".diff_b"
        return _KOHYA_PAIR[role] if "mid" in module.factors else super().suffix(module, role)

    def obstacle(self, module: Module) -> str | None:
        """ComfyUI adds a bias (`diff_b`) without alpha / rank: it is right only at scale 1."""
        if "bias" in module.factors and module.scale != 1.0:
            return "comfyui scales a lora_bias by 1 and not by alpha / rank"
        constraint = module.factors.get("constraint")
        if constraint is not None and constraint.item() > 0:
            return f"comfyui takes the constraint of {module.family.title} for another one: without the width"
        if module.family.id == "oft" and "rescale" in module.factors:
            return "comfyui ignores the rescale of OFT"
        return super().obstacle(module)

    def alpha_tensor(self, module: Module) -> LazyTensor | None:
        """None at scale 1: ComfyUI takes an absent alpha as the rank."""
        return None if module.scale == 1.0 else super().alpha_tensor(module)


_OWN_NAMES = (".scale",)


def _own_name(voice: Voice, name: str, component: str, architecture: Architecture) -> str | None:
    """What a parameter has behind its module's name, where that is not `.weight`."""
    naming = architecture.naming(component, voice.naming)
    key = naming.home(naming[name][0]).tensor_key
    return key[len(name) :] if key.startswith(name) and key[len(name) :] in _OWN_NAMES else None


_SPELLING: Mapping[tuple[str, str], str] = {
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up"): ".lora_B.weight",
    ("lora", "mid"): ".lora_mid.weight",
    ("lora", "bias"): ".lora_B.bias",  # what is read; ComfyUI itself wants `diff_b`: see `suffix`
    **LOKR,
    **LOHA,
    **{meaning: suffix for meaning, suffix in WEIGHT_CHANGING.items() if meaning[1] not in ("diag", "bm")},
    **FULL,
    ("set", "weight"): ".set_weight",
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
        BESIDE_NORM: ("diff", "bias"),
    },
)
