"""unpack: a LoRA of fewer ranks out of a DyLoRA, which was trained so that its first ranks are one by themselves.

Valipour et al. 2022, arXiv:2210.07558. sd-scripts and LyCORIS save a DyLoRA in a LoRA's own keys, all ranks of it;
only the header says what it is. As sd-scripts' `extract_lora_from_dylora.py` does, the first components are taken, and
alpha stays the number that it was: the scale becomes alpha / the new rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.errors import LoratoolError, UsageError
from loratool.core.module import Module


def unpacked(adapter: Adapter, rank: int) -> Adapter:
    """The adapter with the first `rank` components of every module; smaller modules stay as they are.

    Raises LoratoolError for what is no DyLoRA, UsageError for a rank that its blocks do not end at.
    """
    unit = block_of(adapter.metadata)
    if unit is None:
        raise LoratoolError(
            "its header does not say that it is a DyLoRA: the first ranks of any other LoRA mean nothing by themselves",
            hint="resize --rank N gives the best approximation of that rank",
        )
    if rank < 1 or rank % unit:
        raise UsageError(f"--unpack is {rank}, expected a multiple of the {unit} ranks that were trained together")
    return replace(adapter, modules=tuple(_first(module, rank) for module in adapter.modules))


def block_of(metadata: Mapping[str, str]) -> int | None:
    """How many ranks were trained together, as a file's header says; None if it is no DyLoRA."""
    try:
        args = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        args = None
    args = args if isinstance(args, dict) else {}
    module = metadata.get("ss_network_module", "")
    by_kohya, by_lycoris = module.endswith("dylora"), str(args.get("algo", "")).lower() == "dylora"
    if not (by_kohya or by_lycoris):
        return None
    told = str(args.get("unit" if by_kohya else "block_size", 1 if by_kohya else 4))
    return max(int(told), 1) if told.isdigit() else 1


def _first(module: Module, rank: int) -> Module:
    if module.family.live(module.factors) is None or module.rank <= rank:
        return module
    alpha = module.alpha if module.alpha is not None else float(module.rank)
    return replace(module, factors=module.family.keep(module.factors, range(rank)), alpha=alpha, keys={})
