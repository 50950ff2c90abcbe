"""PEFT's LoraConfig as data: from a config to the alpha of each module, and back. Shared by `peft` and `diffusers`.

The scale of a module is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`; `rank_pattern` and
`alpha_pattern` are regular expressions that must match the end of a module's path (peft.utils.get_pattern_key).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratool.core.architecture import Architecture, Voice
from loratool.core.errors import FormatError, NotRepresentable
from loratool.core.module import Module
from loratool.core.patterns import Bounded, Unsafe, names
from loratool.core.tensor import LazyTensor

_ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|hada_\w+|lokr_\w+|ia3_l|boft_[Rs]|oft_R)"
    r"\.([^.]+)(\.weight|\.bias)?$"
)
FEW = 128
"""PEFT compiles every expression for every module: beyond what Python's cache of expressions holds (512, for two
patterns), that takes a minute for a full SDXL file."""

MOST_EXPRESSIONS = 256
"""So many expressions that are no mere names are matched: each takes some milliseconds."""

_DOTTED = re.compile(r"[\w.-]+")
_BY_NAME = {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


def json_object(text: str, key: str) -> dict[str, Any]:
    """The JSON object in `text`. FormatError, about `key`, if there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON: {error}", key=key) from error
    if not isinstance(found, dict):
        raise FormatError("is not a JSON object", key=key)
    return found


def number(config: Mapping[str, Any], field: str) -> float | None:
    """A numeric field of a config; None if absent. FormatError if it is something else."""
    value = config.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        raise FormatError(f"{field} is {value!r}, expected a number", key=field)
    return float(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def pattern(config: Mapping[str, Any], field: str) -> Mapping[str, float]:
    """A `rank_pattern` / `alpha_pattern`. FormatError if it is no map from expressions to numbers."""
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise FormatError(f"{field} is {value!r}, expected a map from names to numbers", key=field)
    return {key: number(value, key) or 0.0 for key in value}


class Matcher:
    """The first expression of a pattern that matches the end of a path, as PEFT looks it up, in bounded time."""

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self._values = list(patterns.values())
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._dotted: dict[str, list[tuple[int, str]]] = {}
        self._others: list[tuple[int, Bounded]] = []
        for index, key in enumerate(patterns):
            if _DOTTED.fullmatch(key):
                self._dotted.setdefault(key.rpartition(".")[2], []).append((index, key))
                continue
            listed = names(key)
            for name in listed or ():
                (self._whole if name.whole else self._ends).setdefault(name.text, index)
            if listed is None:
                if len(self._others) >= MOST_EXPRESSIONS:
                    raise FormatError(
                        f"holds more than {MOST_EXPRESSIONS} expressions", hint="write the modules' names instead"
                    )
                self._others.append((index, _bounded(key)))

    def __call__(self, path: str, default: float) -> float:
        """The value for `path`."""
        ends = [path, *(path[i + 1 :] for i, char in enumerate(path) if char == ".")]
        found = [self._ends[end] for end in ends if end in self._ends]
        if path in self._whole:
            found.append(self._whole[path])
        for end, keys in self._dotted.items():
            if path.endswith(end):
                found += [index for index, key in keys if _ends(path, key)]
        first = min(found, default=len(self._values))
        for index, bounded in self._others:
            if index > first:
                break
            if bounded.match(path):
                first = index
                break
        return self._values[first] if first < len(self._values) else default


def _ends(path: str, key: str) -> bool:
    """Whether a name with unescaped dots, which stand for any character, matches the end of a path."""
    start = len(path) - len(key)
    if start < 0 or (start and path[start - 1] != "."):
        return False
    return all(wanted in (".", char) for wanted, char in zip(key, path[start:]))


def _bounded(key: str) -> Bounded:
    try:
        return Bounded(rf"(.*\.)?({key})$")
    except re.error as error:
        raise FormatError(f"{key[:80]!r} is not a regular expression: {error}") from error
    except Unsafe as error:
        raise FormatError(
            f"{key[:80]!r} is an expression that is not run: {error}", hint="write the modules' names instead"
        ) from error


def alphas(config: Mapping[str, Any], modules: Sequence[tuple[str, Module]]) -> list[float | None]:
    """The alpha of each (path, module) such that alpha / rank is the scale PEFT applies; None if there is none."""
    lora_alpha = number(config, "lora_alpha")
    patterns = Matcher(pattern(config, "alpha_pattern"))
    rslora = config.get("use_rslora") is True
    found: list[float | None] = []
    for path, module in modules:
        if lora_alpha is None and not config.get("alpha_pattern"):
            found.append(None)
            continue
        alpha = patterns(path, lora_alpha if lora_alpha is not None else 8.0)
        found.append(alpha * math.sqrt(module.rank) if rslora else alpha)
    return found


def anchored(path: str) -> str:
    """An expression that matches this path alone and not longer ones that end in it."""
    return "^" + re.escape(path)


def config_of(
    modules: Sequence[tuple[str, Module]], others: frozenset[str] | None, anchor: bool = True
) -> dict[str, Any]:
    """The LoraConfig fields under which PEFT gives each (path, module) its rank and scale.

    `others` are all paths of the model (None: not known). Where a path is, or might be, the end of another one's,
    targets are written as one exact expression, because PEFT matches names in a list by their end. `anchor` says that
    paths are whole, and pattern keys are marked as such; else something may stand before them.
    """
    _all_or_none(modules, "DoRA magnitude", lambda module: module.magnitude is not None)
    _all_or_none(modules, "lora_bias", lambda module: "bias" in module.factors)
    paths = [path for path, _ in modules]
    said = ranks_said({path: (module.rank, module.scale) for path, module in modules}, "lora_alpha", anchor)
    return said | {
        "target_modules": paths_said(paths, others, anchor),
        "use_dora": any(module.magnitude is not None for _, module in modules),
        "lora_bias": any("bias" in module.factors for _, module in modules),
    }


def ranks_said(modules: Mapping[str, tuple[int, float]], alpha_field: str, anchor: bool = True) -> dict[str, Any]:
    """The fields that give each path its rank and scale: the commonest ones, and patterns for the others."""
    rank = Counter(rank for rank, _ in modules.values()).most_common(1)[0][0]
    effective = {path: _plain(scale * rank) for path, (rank, scale) in modules.items()}
    alpha = Counter(effective.values()).most_common(1)[0][0]
    name = anchored if anchor else re.escape
    return {
        "r": rank,
        alpha_field: alpha,
        "rank_pattern": _patterns({path: own for path, (own, _) in modules.items() if own != rank}, name),
        "alpha_pattern": _patterns({path: own for path, own in effective.items() if own != alpha}, name),
    }


def _patterns(values: Mapping[str, float], name: Callable[[str], str]) -> dict[str, float]:
    """An expression per path, or, past FEW of them, per value."""
    if len(values) <= FEW:
        return {name(path): value for path, value in values.items()}
    grouped: dict[float, list[str]] = {}
    for path, value in values.items():
        grouped.setdefault(value, []).append(name(path))
    return {"|".join(names): value for value, names in grouped.items()}


def _all_or_none(modules: Sequence[tuple[str, Module]], what: str, has: Callable[[Module], bool]) -> None:
    """PEFT switches these on for all modules of a config: NotRepresentable if only some have them."""
    without = tuple(module.title for _, module in modules if not has(module))
    if without and len(without) < len(modules):
        raise NotRepresentable(
            f"{len(without)} of {len(modules)} modules have no {what}, and PEFT knows it only for all of them",
            modules=without,
        )


def paths_said(paths: Sequence[str], others: frozenset[str] | None, anchor: bool = True) -> list[str] | str:
    """These modules and no `others`, as PEFT chooses them: a list, or an expression where a path ends in another."""
    wanted = set(paths)
    if others is not None:
        ends = {other[i + 1 :] for other in others - wanted for i, char in enumerate(other) if char == "."}
        if not wanted & ends:
            return sorted(wanted)
    expression = "|".join(f"({re.escape(path)})" for path in sorted(wanted))
    return expression if anchor else rf"(.*\.)?({expression})"


def _plain(value: float) -> float | int:
    """A whole number as int, as people write them in configs."""
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def without_adapter_name(key: str) -> str:
    """A key without the adapter name that live PEFT models have in it (`lora_A.default.weight`)."""
    if key.endswith((".lora_A.weight", ".lora_B.weight")):
        return key  # as almost all are: not worth an expression
    match = _ADAPTER_NAME.search(key)
    if match is None or match[2] in ("weight", "bias"):
        return key
    end = "" if match[1] in _BY_NAME else match[3] or ""
    return f"{key[: match.start()]}.{match[1]}{end}"


def path_of(module: Module, architecture: Architecture, voices: Mapping[str, Voice]) -> str:
    """The module's path as PEFT sees it, which is the name it has in its component's voice."""
    naming = architecture.naming(module.component, voices[module.component].naming)
    return naming.name_of(module.targets) or module.targets[0].module_path


def all_paths(architecture: Architecture, component: str, voices: Mapping[str, Voice]) -> frozenset[str] | None:
    """Every path of a component in its voice; None without a table."""
    return None if architecture.open else frozenset(architecture.naming(component, voices[component].naming))


def peft_obstacle(module: Module, layout: str) -> str | None:
    """PEFT's magnitude has one value per output feature: a row of the weight, or a column of an embedding's."""
    if module.magnitude is None:
        return None
    if module.magnitude_per_row != _is_embedding(module):
        return (
            None if module.family.id == "lora" else f"{layout} has no DoRA magnitude for a {module.family.title} module"
        )
    return f"{layout} has no DoRA magnitude per input feature"


def peft_magnitude(module: Module) -> LazyTensor:
    """A magnitude per output feature in PEFT's shape: `(out,)`, for a convolution `(1, out, 1, 1)`."""
    assert module.magnitude is not None
    out = module.magnitude.numel
    return module.magnitude.reshape((1, out, *(1,) * (len(module.shape) - 2)) if len(module.shape) > 2 else (out,))


def _is_embedding(module: Module) -> bool:
    return "embedding_A" in module.factors
