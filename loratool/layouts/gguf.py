"""gguf: llama.cpp's LoRA files. `blk.0.attn_q.weight.lora_a` `(rank, in)`, `.lora_b` `(out, rank)`; language models.

`adapter.lora.alpha` is one alpha for all modules, `general.architecture` the model's architecture. `token_embd`'s
`lora_a` is `(vocabulary, rank)`. Names come from the maps of the `gguf` package.

llama.cpp turns the rows of q and k of Llama and Mistral models: each head's two halves, which transformers keeps one
after the other, are interleaved, in `lora_b` as in the weight. How many heads there are is not in the file: only with
the model's `config.json` (`--base FOLDER`) do these modules have a name in other layouts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from loratool.core.adapter import GGUF, Adapter, Bundle
from loratool.core.architecture import Architecture, Resolver, Spoken, Voice
from loratool.core.errors import NotRepresentable
from loratool.core.layout import Layout, Parsed, Voices
from loratool.core.module import Module
from loratool.core.scale import TAKE_SCALE, all_at_scale, stuck
from loratool.core.tensor import LazyTensor, transposed
from loratool.layouts._derived import renamed, written

ARCHITECTURE, ALPHA_ENTRY, TYPES = "general.architecture", "adapter.lora.alpha", "gguf.types"
_MODEL, _OWN = "model", "llama.cpp"
"""The components: modules with transformers' names, and those that only llama.cpp can name."""

_ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3")},
    "gemma3_text": "gemma3",
}
"""transformers' `model_type` -> llama.cpp's architecture, of models whose linears llama.cpp renames, and no more than
that; of Llama and Mistral it also turns q and k."""

_TURNED = {"llama": ("attn_q", "attn_k")}
_INSIDE = (
    *("self_attn.qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_FUSED = {"phi3": {"mlp.up_proj": "mlp.gate_up_proj"}}
_OUTSIDE = ("model.embed_tokens", "lm_head")
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def _voices(architecture: Architecture) -> Voices:
    voice = renamed(written(architecture, "peft").get(_MODEL), "")
    if voice is None:
        return {}
    return {_MODEL: (voice,), _OWN: (voice,)} if architecture.open else {_MODEL: (voice,)}


class Gguf(Layout):
    """llama.cpp's adapter."""

    def signed(self, metadata: Mapping[str, str]) -> bool:
        """The file says what it is."""
        return metadata.get("adapter.type") == "lora"

    def resolver(self, architecture: Architecture, metadata: Mapping[str, str]) -> Resolver:
        """transformers' name of a tensor of llama.cpp's; its own where that would be wrong or is not known."""
        kind = metadata.get(ARCHITECTURE)
        voices = dict(self.written(architecture))

        def resolve(stem: str) -> Sequence[Spoken]:
            if kind is None or not voices:
                return ()
            name = stem.removesuffix(".weight")
            path = _path(kind, name) if stem.endswith(".weight") else None
            if _turned(kind, name) is not None and _heads(architecture, name) is None:
                path = None
            if architecture.open:
                component = _OWN if path is None else _MODEL
                return (Spoken(component, voices[component], path or stem, None),)
            naming = architecture.naming(_MODEL, voices[_MODEL].naming)
            return () if path is None or path not in naming else (Spoken(_MODEL, voices[_MODEL], path, naming[path]),)

        return resolve

    def read(self, bundle: Bundle, architecture: Architecture, parsed: Parsed | None = None) -> Adapter:
        """With q and k in transformers' order, where the number of heads is known."""
        adapter = super().read(bundle, architecture, parsed)
        kind = bundle.metadata.get(ARCHITECTURE, "")
        modules = tuple(
            _with_up(module, _turn(module, architecture, kind, back=True)) if module.component == _MODEL else module
            for module in adapter.modules
        )
        return replace(adapter, modules=modules)

    def read_factors(self, family: str, factors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """`token_embd`'s pair is an embedding's."""
        if "embedding_A" in factors:
            factors["embedding_A"] = transposed(factors["embedding_A"])
        return factors

    def split(self, key: str) -> tuple[str, str, str] | None:
        """An embedding's factors have the suffixes of any other's."""
        parts = super().split(key)
        if parts is None or not parts[0].startswith("token_embd"):
            return parts
        return parts[0], "lora", "embedding_A" if parts[2] == "down" else "embedding_B"

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """The one alpha; 0 means none."""
        alpha = float(json.loads(adapter.metadata.get(ALPHA_ENTRY, "0"))) or None
        notes = adapter.notes
        if any(module.component == _OWN for module in adapter.modules):
            note = (
                "rows of q and k are in llama.cpp's order, or names are known to llama.cpp alone: for other layouts "
                "name the model's folder, with its config.json, with --base"
            )
            notes = (*notes, note)
        return replace(adapter, modules=tuple(replace(m, alpha=alpha) for m in adapter.modules), notes=notes)

    def obstacle(self, module: Module) -> str | None:
        """Linears and embeddings."""
        return f"{self.id} has no convolutions" if len(module.shape) > 2 else super().obstacle(module)

    def ready(self, modules: Sequence[Module]) -> tuple[Module, ...]:
        """All at the commonest alpha, whatever their ranks."""
        alpha = Counter(module.scale * module.rank for module in modules).most_common(1)[0][0]
        fixed = tuple(module.title for module in modules if stuck(module, alpha / module.rank))
        if fixed:
            raise NotRepresentable(f"{self.id} has one alpha for all modules", modules=fixed, hint=TAKE_SCALE)
        made = all_at_scale(modules, lambda module: alpha / module.rank)
        return tuple(replace(module, alpha=alpha) for module in made)

    def stem(self, module: Module, architecture: Architecture, voices: Mapping[str, Voice]) -> str:
        """llama.cpp's name of the weight."""
        path = super().stem(module, architecture, voices)
        if module.component == _OWN:
            return path
        name = next((name for kind in _kinds(architecture) if (name := _name(kind, path)) is not None), None)
        if name is None:
            raise NotRepresentable(f"llama.cpp has no name for {path}", modules=(module.title,))
        return f"{name}.weight"

    def spell(
        self, module: Module, architecture: Architecture, voices: Mapping[str, Voice]
    ) -> dict[str, tuple[str, LazyTensor]]:
        """With the rows of q and k turned as llama.cpp's."""
        if module.component == _MODEL and not architecture.open:
            kind = _kind(architecture)
            module = _with_up(module, _turn(module, architecture, kind or "", back=False))
        return super().spell(module, architecture, voices)

    def stored_factor(self, module: Module, role: str, factor: LazyTensor) -> LazyTensor:
        """`token_embd.lora_a` is `(vocabulary, rank)`."""
        return transposed(factor) if role == "embedding_A" else factor

    def alpha_tensor(self, module: Module) -> LazyTensor | None:
        """In an entry of its own."""
        return None

    def finish(self, adapter: Adapter, bundle: Bundle, voices: Mapping[str, Voice]) -> Bundle:
        """With llama.cpp's entries. NotRepresentable where nothing says what model it is for."""
        kind = _kind(adapter.architecture) or bundle.metadata.get(ARCHITECTURE)
        if kind is None:
            raise NotRepresentable(
                f"{self.id} has to say the model's architecture, which nothing tells",
                hint="name the model's folder, with its config.json, with --base "
                f"(known: {', '.join(sorted(_ARCHITECTURES))})",
            )
        turned = [m.title for m in adapter.modules if m.component == _MODEL and _needs_heads(m, adapter, kind)]
        if turned:
            raise NotRepresentable(
                f"{self.id} has the rows of q and k in an order that depends on the number of heads",
                modules=tuple(turned),
                hint="name the model's folder, with its config.json, with --base",
            )
        first = adapter.modules[0]
        types = json.loads(bundle.metadata.get(TYPES, "{}")) | {ALPHA_ENTRY: ["FLOAT32"]}
        entries = {
            **bundle.metadata,
            ARCHITECTURE: kind,
            "general.type": "adapter",
            "adapter.type": "lora",
            ALPHA_ENTRY: json.dumps(float(first.rank if first.alpha is None else first.alpha)),
            TYPES: json.dumps(types, sort_keys=True),
        }
        return replace(bundle, metadata=entries, container=GGUF)


def _kind(architecture: Architecture) -> str | None:
    """llama.cpp's architecture of a model whose config is known."""
    return _ARCHITECTURES.get(str(architecture.config.get("model_type")))


def _kinds(architecture: Architecture) -> Sequence[str]:
    """The architecture's own map, or, where it is not known, all: they agree on what they know."""
    kind = _kind(architecture)
    return (kind,) if kind else tuple(dict.fromkeys(_ARCHITECTURES.values()))


def _needs_heads(module: Module, adapter: Adapter, kind: str) -> bool:
    name = _name(kind, module.targets[0].path)
    return name is not None and _turned(kind, name) is not None and _heads(adapter.architecture, name) is None


def _turned(kind: str, name: str) -> str | None:
    """`attn_q` or `attn_k`, if llama.cpp turns the rows of this tensor."""
    match = _BLOCK.match(name)
    return match[2] if match and match[2] in _TURNED.get(kind, ()) else None


def _heads(architecture: Architecture, name: str) -> int | None:
    """The number of heads whose rows stand in a q or k."""
    config: Mapping[str, Any] = architecture.config
    heads = config.get("num_attention_heads")
    if name.endswith("attn_k"):
        heads = config.get("num_key_value_heads") or heads
    return heads if isinstance(heads, int) and heads > 0 else None


def _turn(module: Module, architecture: Architecture, kind: str, back: bool) -> LazyTensor | None:
    """`up` in llama.cpp's row order, or `back` in transformers'; None where the two are the same.

    llama.cpp: (heads, 2, half) -> (heads, half, 2).
    """
    name = _name(kind, module.targets[0].path)
    heads = _heads(architecture, name) if name and _turned(kind, name) else None
    up = module.factors.get("up")
    if heads is None or up is None:
        return None
    rows, rank = up.shape
    if rows % (2 * heads):
        raise NotRepresentable(f"{rows} rows are not those of {heads} heads", modules=(module.title,))
    half = rows // heads // 2
    order = (heads, half, 2) if back else (heads, 2, half)
    return LazyTensor.computed(
        up.shape, up.dtype, lambda: up.load().reshape(*order, rank).transpose(1, 2).reshape(rows, rank).contiguous()
    )


def _with_up(module: Module, up: LazyTensor | None) -> Module:
    return module if up is None else replace(module, factors={**module.factors, "up": up})


@cache
def _names(kind: str) -> Mapping[str, str]:
    """transformers' name -> llama.cpp's, of one block and of what is outside of all blocks, by the package's map."""
    import gguf

    found = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), None)
    if found is None or kind not in _ARCHITECTURES.values():
        return {}
    names = gguf.get_tensor_name_map(found, 1)
    inside = [_FUSED.get(kind, {}).get(path, path) for path in _INSIDE]
    paths = [*(f"model.layers.0.{path}" for path in inside), *_OUTSIDE]
    return {path: name for path in paths if (name := names.get_name(path)) is not None}


def _name(kind: str, path: str) -> str | None:
    """llama.cpp's name of a module, without `.weight`; None if the map has none."""
    match = _LAYER.match(path)
    if match is None:
        return _names(kind).get(path)
    name = _names(kind).get(f"model.layers.0.{match[2]}")
    return None if name is None else name.replace("blk.0.", f"blk.{match[1]}.", 1)


def _path(kind: str, name: str) -> str | None:
    """The module path of a tensor of llama.cpp's; None if the map has none."""
    paths = {theirs: ours for ours, theirs in _names(kind).items()}
    match = _BLOCK.match(name)
    if match is None:
        return paths.get(name)
    path = paths.get(f"blk.0.{match[2]}")
    return None if path is None else path.replace("layers.0.", f"layers.{match[1]}.", 1)


LAYOUT = Gguf(
    id="gguf",
    title="GGUF (llama.cpp)",
    separator=".",
    spelling={
        ("lora", "embedding_A"): ".lora_a",
        ("lora", "embedding_B"): ".lora_b",
        ("lora", "down"): ".lora_a",
        ("lora", "up"): ".lora_b",
    },
    header_entries=(TYPES, ARCHITECTURE, "general.type", "adapter.type", ALPHA_ENTRY),
    derive=_voices,
    names=("llama.cpp",),
)
