"""Headers: what the metadata of a made file must say so that it is true."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loratool import __version__
from loratool.core.adapter import Adapter
from loratool.core.layout import Layout
from loratool.core.network import alpha_of
from loratool.ops import origin, recipe

HISTORY = "loratool.history"

PLACEHOLDER = "0" * 64
"""Stands for `sshs_model_hash` until the writer has hashed what it writes."""

STALE = ("modelspec.hash_sha256",)
"""Hashes over the tensors in an order that another spelling changes: they would be false."""


def converted_header(adapter: Adapter, source: Layout, layout: Layout, written: Mapping[str, str]) -> dict[str, str]:
    """The header of a converted file: the old one, less what described the old spelling, with true network facts.

    `adapter` is grouped as in the new file, `written` what `layout` itself put into the header.
    """
    foreign = set(source.header_entries) - set(layout.header_entries) if source.id != layout.id else set()
    header = {k: v for k, v in written.items() if k not in foreign and k not in STALE and k != origin.ENTRY}
    if layout.id == "kohya":
        facts = {NETWORK_MODULE: "", **adapter.architecture.facts} | {NETWORK_MODULE: _network_module(adapter)}
        header = {**facts, **header}
        header.setdefault("ss_network_dim", "")
        header.setdefault("ss_network_alpha", "")
        header.setdefault("sshs_model_hash", PLACEHOLDER)
        header.setdefault("sshs_legacy_hash", PLACEHOLDER[:8])
    if "ss_network_dim" in header:
        header["ss_network_dim"] = commonest(
            Counter(m.rank for m in adapter.modules if m.rank), header["ss_network_dim"]
        )
    if "ss_network_alpha" in header:
        alphas = Counter(alpha_of(m) for m in adapter.modules if m.rank)
        header["ss_network_alpha"] = commonest(alphas, header["ss_network_alpha"])
    return header


def made_header(
    adapter: Adapter, source: Layout, layout: Layout, written: Mapping[str, str], made: Mapping[str, Any]
) -> dict[str, str]:
    """The header of a merged or resized file: as `converted_header`, with the recipe `made` that gives it again."""
    header = converted_header(adapter, source, layout, written)
    if "ss_network_args" in header:
        header["ss_network_args"] = _network_args(header["ss_network_args"], adapter)
    header[recipe.ENTRY] = recipe.encode(made)
    note = {"op": made["command"], **{key: made[key] for key in ("method", "rule") if key in made}}
    return with_history(header, note)


def merged_metadata(
    metadata: Sequence[Mapping[str, str]], names: Sequence[str], title: str, keep: str
) -> dict[str, str]:
    """The inputs' header entries that a merge keeps: those of the first, of all (the first that has one), or none.

    What described one input alone and would be false of the merge is left out or said anew: title, date, recipe.
    """
    chosen = {"first": metadata[:1], "union": metadata, "none": []}[keep]
    header: dict[str, str] = {}
    for entries in chosen:
        header = {**header, **{key: value for key, value in entries.items() if key not in header}}
    header = {key: value for key, value in header.items() if key not in _ONE_FILE}
    if any(key.startswith("modelspec.") for key in header):
        header |= {"modelspec.title": title, "modelspec.merged_from": ", ".join(names)}
    if "ss_output_name" in header:
        header["ss_output_name"] = title
    return header


NETWORK_MODULE = "ss_network_module"
"""Header entry: the Python module that trains such a network. An architecture's fact is the one for plain LoRA."""

_ONE_FILE = frozenset({recipe.ENTRY, origin.ENTRY, HISTORY, "modelspec.date", "modelspec.thumbnail"})
"""Entries that are true of one file only."""


def _network_args(stated: str, adapter: Adapter) -> str:
    """`ss_network_args` with the rank and alpha of k x k convolutions as they are now; "None" where there are none."""
    try:
        args = json.loads(stated)
    except ValueError:
        return stated
    if not isinstance(args, dict):
        return stated
    kernels = [module for module in adapter.modules if module.rank and any(size > 1 for size in module.shape[2:])]
    for key, values in (
        ("conv_dim", Counter[float](m.rank for m in kernels)),
        ("conv_alpha", Counter[float](alpha_of(m) for m in kernels)),
    ):
        if key in args:
            args[key] = commonest(values, str(args[key])) if values else None
    return json.dumps(args)


def commonest(values: Counter[int] | Counter[float], stated: str) -> str:
    """What sd-scripts states: the one value, or "Dynamic". What the file states stays if it is the commonest value:
    trainers state the main dim and put a convolution's own into `ss_network_args`."""
    if not values:
        return stated  # no module has a rank
    ((value, _), *_) = values.most_common(1)
    try:
        if float(stated) == value:
            return stated
    except ValueError:
        pass
    return f"{value:g}" if len(values) == 1 else "Dynamic"


def _network_module(adapter: Adapter) -> str:
    """The Python module that trains such a network."""
    if any(module.family.id != "lora" or "mid" in module.factors for module in adapter.modules):
        return "lycoris.kohya"
    return adapter.architecture.facts.get(NETWORK_MODULE, "networks.lora")


def with_history(header: Mapping[str, str], note: Mapping[str, object]) -> dict[str, str]:
    """The header with one more entry in `loratool.history`, a JSON list of what was done to the file."""
    try:
        entries = json.loads(header.get(HISTORY, "[]"))
    except ValueError:
        entries = []
    entries = [*(entries if isinstance(entries, list) else []), {**note, "version": __version__}]
    return {**header, HISTORY: json.dumps(entries)}
