"""mlx: mlx-lm's folder, `adapters.safetensors` and `adapter_config.json`: language models on Apple's chips.

`lora_a` is `(in, rank)` and `lora_b` `(rank, out)`: transposed. One rank and one `scale` for all modules, which is what
others call alpha / rank. A DoRA magnitude is called `m`. Names are the model's own, with nothing in front.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.core.adapter import CONFIG, MLX, Adapter, Bundle
from loratool.core.architecture import Architecture, Voice
from loratool.core.errors import FormatError, NotRepresentable
from loratool.core.layout import ANY, MAGNITUDE, Layout, Parsed, Voices
from loratool.core.module import Module
from loratool.core.scale import TAKE_SCALE, all_at_scale, stuck
from loratool.core.tensor import LazyTensor, transposed
from loratool.layouts._derived import renamed, written
from loratool.layouts._peft_config import json_object, number

_COMPONENT = "model"
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|wpe|embed_in)\.lora_[ab]$")
_LAYER = re.compile(r"^(?:.*\.)?(?:layers|blocks|h)\.\d+\.(.+)$")
_EVERY_LAYER = -1
"""mlx-lm counts layers from the last one; a negative number is all of them."""


def _voices(architecture: Architecture) -> Voices:
    voice = renamed(written(architecture, "peft").get(_COMPONENT), "")
    return {} if voice is None else {_COMPONENT: (voice,)}


class Mlx(Layout):
    """The folder of mlx-lm."""

    def split(self, key: str) -> tuple[str, str, str] | None:
        """An embedding's factors have the suffixes of any other's."""
        parts = super().split(key)
        if parts is None or not _EMBEDDING.search(key):
            return parts
        return parts[0], "lora", "embedding_A" if parts[2] == "down" else "embedding_B"

    def read(self, bundle: Bundle, architecture: Architecture, parsed: Parsed | None = None) -> Adapter:
        """Updates of experts, one matrix for each in a stack, are extras: no other layout has such modules."""
        parsed = parsed or self.parse(list(bundle.tensors))
        stacks = {
            stem for stem, group in parsed.groups.items() if any(len(bundle.tensors[k].shape) > 2 for k in group.keys)
        }
        if stacks:
            strays = [key for stem in stacks for key in parsed.groups[stem].keys]
            groups = {stem: group for stem, group in parsed.groups.items() if stem not in stacks}
            parsed = Parsed(groups, (*parsed.unknown, *strays))
        return super().read(bundle, architecture, parsed)

    def read_factors(self, family: str, factors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """As `(rank, in)` and `(out, rank)`."""
        return {role: transposed(f) if len(f.shape) == 2 else f for role, f in factors.items()}

    def stored_factor(self, module: Module, role: str, factor: LazyTensor) -> LazyTensor:
        """As `(in, rank)` and `(rank, out)`."""
        return transposed(factor)

    def stored_magnitude(self, module: Module) -> LazyTensor:
        """One value per row."""
        assert module.magnitude is not None
        return module.magnitude.reshape((module.magnitude.numel,))

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """`scale` of the config, as alpha = scale * rank."""
        text = adapter.side_files.get(CONFIG)
        if text is None:
            note = f"no {CONFIG} beside the file: its scale is unknown and taken as 1"
            return replace(adapter, notes=(*adapter.notes, note))
        scale = number(_parameters(text), "scale")
        if scale is None:
            return adapter
        return replace(adapter, modules=tuple(replace(m, alpha=scale * m.rank) for m in adapter.modules))

    def obstacle(self, module: Module) -> str | None:
        """Linears and embeddings, and a magnitude per row."""
        if len(module.shape) > 2:
            return f"{self.id} has no convolutions"
        if module.magnitude is not None and not module.magnitude_per_row:
            return f"{self.id} has no DoRA magnitude per input feature"
        return super().obstacle(module)

    def ready(self, modules: Sequence[Module]) -> tuple[Module, ...]:
        """All at the commonest scale. NotRepresentable where ranks differ, or only some are DoRA."""
        ranks = Counter(module.rank for module in modules)
        if len(ranks) > 1:
            odd = tuple(m.title for m in modules if m.rank != ranks.most_common(1)[0][0])
            hint = f"make them one rank first: loratool resize --rank {min(ranks)}"
            raise NotRepresentable(
                f"{self.id} has one rank for all modules: here are {len(ranks)}", modules=odd, hint=hint
            )
        plain = tuple(module.title for module in modules if module.magnitude is None)
        if plain and len(plain) < len(modules):
            raise NotRepresentable(f"{self.id} knows DoRA only for all modules: {len(plain)} have none", modules=plain)
        scale = Counter(module.scale for module in modules).most_common(1)[0][0]
        fixed = tuple(module.title for module in modules if stuck(module, scale))
        if fixed:
            raise NotRepresentable(f"{self.id} has one scale for all modules", modules=fixed, hint=TAKE_SCALE)
        return all_at_scale(modules, lambda module: scale)

    def finish(self, adapter: Adapter, bundle: Bundle, voices: Mapping[str, Voice]) -> Bundle:
        """With the config."""
        first = adapter.modules[0]
        kept = adapter.side_files.get(CONFIG) if adapter.layout == self.id else None
        config = json_object(kept, CONFIG) if kept is not None else {}
        stems = [self.stem(module, adapter.architecture, voices) for module in adapter.modules]
        config |= {
            "fine_tune_type": "lora" if first.magnitude is None else "dora",
            "num_layers": config.get("num_layers", _EVERY_LAYER),
            "lora_parameters": {
                "dropout": 0.0,
                **(config.get("lora_parameters") or {}),
                "rank": first.rank,
                "scale": first.scale,
                "keys": sorted({_inside(stem) for stem in stems}),
            },
        }
        text = json.dumps(config, indent=4, sort_keys=True) + "\n"
        return replace(bundle, metadata={**bundle.metadata, "format": "mlx"}, side_files={CONFIG: text}, container=MLX)


def _inside(stem: str) -> str:
    """A module's path inside its layer, which is what mlx-lm lists; the whole path of one outside of all layers."""
    match = _LAYER.match(stem)
    return match[1] if match else stem


def _parameters(text: str) -> Mapping[str, Any]:
    """`lora_parameters` of a config. FormatError for one of whole weights."""
    config = json_object(text, CONFIG)
    if config.get("fine_tune_type", "lora") not in ("lora", "dora"):
        raise FormatError(f"fine_tune_type is {config['fine_tune_type']!r}: whole weights, no adapter", key=CONFIG)
    parameters = config.get("lora_parameters", {})
    if not isinstance(parameters, dict):
        raise FormatError(f"lora_parameters is {parameters!r}, expected a map", key=CONFIG)
    return parameters


LAYOUT = Mlx(
    id="mlx",
    title="mlx-lm folder",
    separator=".",
    spelling={
        ("lora", "embedding_A"): ".lora_a",
        ("lora", "embedding_B"): ".lora_b",
        ("lora", "down"): ".lora_a",
        ("lora", "up"): ".lora_b",
        (ANY, MAGNITUDE): ".m",
    },
    folder=True,
    derive=_voices,
    names=("mlx-lm",),
)
