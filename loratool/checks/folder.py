"""Folders: PEFT's config, the index of shards, and paths that lead elsewhere."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratool.core.adapter import CONFIG, Adapter
from loratool.core.errors import LoratoolError, few
from loratool.core.finding import ERROR, NOTE, WARNING, Check, Code, Finding, codes
from loratool.core.patterns import Bounded, Unsafe, explosive, names
from loratool.files.bundle import MAX_SIDE_FILE
from loratool.files.checkpoint import MAX_INDEX
from loratool.files.look import special
from loratool.files.safetensors import OpenFile
from loratool.files.subjects import Folder
from loratool.layouts._peft_config import Matcher, path_of

_PATTERNS = ("rank_pattern", "alpha_pattern")
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_IMPORTS = ("auto_mapping", "megatron_core", "megatron_config", "trust_remote_code", "custom_modules", "_target_")
"""Fields by which PEFT, or programs around it, find Python code to import."""

MOST_PATTERNS = 2000
"""Patterns of one field that are run: each takes about a millisecond."""

_AGAIN = "download the folder again"
_DISTRUST = "do not use this folder: it leads elsewhere"

_CODES = codes(
    Code("config-missing", WARNING, "No adapter_config.json: alpha is unknown and taken as the rank.", _AGAIN),
    Code("config-broken", ERROR, "The config is no JSON object in UTF-8 of at most 16 MiB.", _AGAIN),
    Code("config-kind", NOTE, "The config is of a kind other than LORA, which is not checked."),
    Code("config-field", ERROR, "A field of the config is of the wrong type.", "correct it"),
    Code("config-rank", ERROR, "r, or a rank in rank_pattern, is below 1.", "correct it"),
    Code("config-rank-differs", ERROR, "The config gives a module another rank than its factors have.", "correct r"),
    Code("config-code", WARNING, "A field names code to import; here it is never used.", "remove it"),
    Code("pattern-broken", ERROR, "A pattern is no regular expression.", "correct it"),
    Code("pattern-unsafe", ERROR, "A pattern that may take forever, or looks around: it is not run.", "name modules"),
    Code("pattern-unmatched", WARNING, "A pattern matches no module of the file.", "correct the pattern, or remove it"),
    Code("index-broken", ERROR, "The index is no JSON object with a weight_map of texts.", _AGAIN),
    Code("shard-missing", ERROR, "A shard that the index names is not there.", _AGAIN),
    Code("shard-lacks", ERROR, "A shard lacks tensors that the index promises.", _AGAIN),
    Code("shard-extra", WARNING, "A shard holds tensors that the index does not name: they are not loaded.", _AGAIN),
    Code("path-outside", ERROR, "A path in the folder is absolute or leads out of it.", _DISTRUST),
    Code("link-outside", WARNING, "A link leads out of the folder.", _DISTRUST),
    Code("shard-special", ERROR, "A shard is a pipe, a device or a socket: it is not opened.", _DISTRUST),
)


def _run(folder: Folder) -> Iterator[Finding]:
    for prefix, path in folder.configs.items():
        yield from _link(folder, path)
        yield from _config(folder, prefix, path)
    for index in folder.indices:
        yield from _index(folder, index)


# ---------------------------------------------------------------- PEFT


def _config(folder: Folder, prefix: str, path: str) -> Iterator[Finding]:
    if special(path) is not None:
        yield CHECK.finding("shard-special", f"is {special(path)}; it was not opened", path)
        return
    if not Path(path).is_file():
        yield CHECK.finding("config-missing", f"there is no {CONFIG} beside the weights", path)
        return
    config, wrong = _json(path, MAX_SIDE_FILE)
    if config is None:
        yield CHECK.finding("config-broken", wrong, path)
        return
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        yield CHECK.finding("config-kind", f"peft_type is {_short(kind)}", path, key="peft_type")
    for field in _IMPORTS:
        if config.get(field):
            message = f"{field} is {_short(config[field])}: PEFT may import what it names"
            yield CHECK.finding("config-code", message, path, key=field)
    yield from _fields(config, path)
    yield from _matches(folder, prefix, config, path)


def _fields(config: Mapping[str, Any], path: str) -> Iterator[Finding]:
    rank = config.get("r", 8)
    ranks = {"r": rank, **_numbers(config.get("rank_pattern"))}
    for name, value in ranks.items():
        if type(value) is not int:
            yield CHECK.finding("config-field", f"{name} is {_short(value)}, expected a whole number", path, key=name)
        elif value < 1:
            yield CHECK.finding("config-rank", f"{name} is {value}, expected at least 1", path, key=name)
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **_numbers(config.get("alpha_pattern"))}
    for name, value in alphas.items():
        if type(value) not in (int, float) or not _finite(value):
            yield CHECK.finding("config-field", f"{name} is {_short(value)}, expected a number", path, key=name)
    for name in _PATTERNS:
        if config.get(name) and not isinstance(config[name], dict):
            message = f"{name} is {_short(config[name])}, expected a map from names to numbers"
            yield CHECK.finding("config-field", message, path, key=name)
    for name in _LISTS:
        value = config.get(name)
        if value is not None and not isinstance(value, str) and not _texts(value):
            message = f"{name} is {_short(value)}, expected a text or a list of texts"
            yield CHECK.finding("config-field", message, path, key=name)


def _numbers(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, (str, int)) for one in value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _matches(folder: Folder, prefix: str, config: Mapping[str, Any], path: str) -> Iterator[Finding]:
    """Every pattern of the config against the names of the modules that are there."""
    ranks = _ranks(folder.adapter, prefix) if folder.adapter is not None else {}
    for field in _PATTERNS:
        keys = list(_numbers(config.get(field)))
        if len(keys) > MOST_PATTERNS:
            message = f"{field} has {len(keys):,} patterns: those behind the first {MOST_PATTERNS} were not run"
            yield CHECK.finding("pattern-unsafe", message, path, key=field)
        for key in keys[:MOST_PATTERNS]:
            yield from _pattern(field, rf"(.*\.)?({key})$", key, ranks, path)
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(field)
        if isinstance(value, str) and value != "all-linear":
            # What is excluded matches nothing of what is there: only whether it is safe is told.
            yield from _pattern(field, value, value, ranks if field == "target_modules" else {}, path)
        elif field == "target_modules" and isinstance(value, list) and ranks:
            odd = [one for one in value if isinstance(one, str) and not _named(one, ranks)]
            if odd:
                message = f"{len(odd)} of {len(value)} names are the end of no module ({few(odd)})"
                yield CHECK.finding("pattern-unmatched", message, path, key=field)
    yield from _same_ranks(config, ranks, path)


def _pattern(field: str, expression: str, shown: str, ranks: Mapping[str, int], path: str) -> Iterator[Finding]:
    listed = names(expression)
    try:
        bounded = None if listed is not None else Bounded(expression)
    except re.error as error:
        yield CHECK.finding("pattern-broken", f"{_short(shown)} is no expression: {error}", path, key=field)
        return
    except Unsafe as error:
        yield CHECK.finding("pattern-unsafe", f"{_short(shown)} is not run: {error}", path, key=field)
        return
    if explosive(shown):
        message = f"{_short(shown)} repeats what repeats: Python and PEFT may run it forever"
        yield CHECK.finding("pattern-unsafe", message, path, key=field)
    if not ranks:
        return
    texts = {name.text for name in listed or ()}
    if not any(name in texts or (bounded is not None and bounded.match(name)) for name in ranks):
        yield CHECK.finding("pattern-unmatched", f"{_short(shown)} matches no module", path, key=field)


def _named(name: str, ranks: Mapping[str, int]) -> bool:
    return name in ranks or any(path.endswith(f".{name}") for path in ranks)


def _ranks(adapter: Adapter, prefix: str) -> dict[str, int]:
    """Path, as the config spells it -> rank, of the modules of one config."""
    own = [m for m in adapter.modules if any(key.startswith(prefix) for key in m.keys.values())]
    return {path_of(module, adapter.architecture, adapter.voices): module.rank for module in own}


def _same_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], path: str) -> Iterator[Finding]:
    pattern = {key: value for key, value in _numbers(config.get("rank_pattern")).items() if type(value) is int}
    if type(config.get("r")) is not int or config["r"] < 1 or not ranks:
        return
    try:
        matcher = Matcher(pattern)
    except LoratoolError:
        return  # told above
    odd = [name for name, rank in ranks.items() if matcher(name, config["r"]) != rank]
    if odd:
        message = f"{len(odd)} of {len(ranks)} modules have another rank than the config says ({few(odd)})"
        yield CHECK.finding("config-rank-differs", message, path, key="r")


# ---------------------------------------------------------------- shards


def _index(folder: Folder, path: str) -> Iterator[Finding]:
    yield from _link(folder, path)
    if special(path) is not None:
        yield CHECK.finding("shard-special", f"is {special(path)}; it was not opened", path)
        return
    index, wrong = _json(path, MAX_INDEX)
    if index is None:
        yield CHECK.finding("index-broken", wrong, path)
        return
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        yield CHECK.finding("index-broken", "has no weight_map of names", path, key="weight_map")
        return
    promised: dict[str, set[str]] = {}
    for key, name in weights.items():
        promised.setdefault(name, set()).add(key)
    place = Path(path).parent
    below = os.path.relpath(place, folder.path)
    for name, keys in promised.items():
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or "\\" in name or ":" in name:
            message = f"says that {_short(min(keys))} is in {_short(name)}, expected the name of a file beside it"
            yield CHECK.finding("path-outside", message, path, key=min(keys))
            continue
        shard = place / name
        yield from _shard(folder, path, shard, keys, name if below == "." else f"{below}/{name}")


def _shard(folder: Folder, index: str, shard: Path, keys: set[str], name: str) -> Iterator[Finding]:
    yield from _link(folder, str(shard))
    if special(str(shard)) is not None:
        yield CHECK.finding("shard-special", f"is {special(str(shard))}; it was not opened", str(shard))
        return
    if not shard.is_file():
        yield CHECK.finding("shard-missing", f"{_short(shard.name)} is not there; {len(keys)} tensors are in it", index)
        return
    held = folder.keys.get(name)
    if held is None:
        return  # what it is has been told
    lacking, more = sorted(keys - held), sorted(held - keys)
    if lacking:
        message = f"lacks {len(lacking)} tensors that {Path(index).name} promises ({few(lacking)})"
        yield CHECK.finding("shard-lacks", message, str(shard), key=lacking[0])
    if more:
        message = f"holds {len(more)} tensors that {Path(index).name} does not place in it ({few(more)})"
        yield CHECK.finding("shard-extra", message, str(shard), key=more[0])


def _link(folder: Folder, path: str) -> Iterator[Finding]:
    """A link that leads out of the folder; those of a Hugging Face cache lead to the blobs beside its snapshots."""
    if not os.path.islink(path):
        return
    root, target = Path(os.path.realpath(folder.path)), Path(os.path.realpath(path))
    blobs = [parent / "blobs" for parent in root.parents]
    if root in target.parents or any(blob in target.parents for blob in blobs):
        return
    yield CHECK.finding("link-outside", f"is a link to {_short(str(target))}", path)


def _json(path: str, most: int) -> tuple[dict[str, Any] | None, str]:
    """The object in a JSON file, or what is wrong with the file."""
    try:
        file = OpenFile(path)
        if file.size > most:
            return None, f"is larger than {most >> 20} MiB"
        found = json.loads(file.pread(file.size, 0).decode("utf-8"))
    except LoratoolError as error:
        return None, error.message
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 text (byte {error.start})"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:
        return None, f"is no JSON: {error}"
    return (found, "") if isinstance(found, dict) else (None, "is no JSON object")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


CHECK = Check("folder", "Folders", "folder", _CODES, _run)
