"""The producer: what trainers, converters and mergers are known to get wrong, where the header tells that they did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from loratool.core.adapter import PEFT_METADATA, RECIPE, Adapter
from loratool.core.finding import ERROR, NOTE, WARNING, Check, Code, Finding, codes
from loratool.core.layout import ALPHA
from loratool.core.module import Module
from loratool.core.network import ALPHA_ENTRY, DIM, alpha_of, has_rank, main_modules, number
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import EMPTY_SHA256, MODEL_HASH
from loratool.files.subjects import Content

_MERGED = "modelspec.merged_from"
_SAME = 1e-6
_FIX = "`loratool fix --only {}` "

_CODES = codes(
    Code(
        "alpha-became-one",
        WARNING,
        "Every alpha is 1, the header says another: a tool took a missing alpha for 1.",
        _FIX.format("alpha-became-one") + "sets the alpha that the header says",
    ),
    Code(
        "scale-twice",
        WARNING,
        "The scale alpha / rank of the header is in the alphas twice.",
        _FIX.format("scale-twice") + "sets the alpha that the header says",
    ),
    Code(
        "alpha-rounded",
        NOTE,
        "An alpha is the header's, rounded to the dtype that it is stored in.",
        _FIX.format("alpha-rounded") + "stores it as float32",
    ),
    Code(
        "diluted-concat",
        WARNING,
        "Merged by concatenating: the rank has grown, the alpha has not, so that the update is too weak.",
        _FIX.format("diluted-concat") + "lets the alpha grow with the rank",
    ),
    Code(
        "merged-factors",
        NOTE,
        "Merged, perhaps by adding up factors: that squares strengths and mixes the LoRAs.",
        "merge the originals with `loratool merge`",
    ),
    Code(
        "hash-of-nothing",
        WARNING,
        "sshs_model_hash is the hash of no data.",
        _FIX.format("hash-of-nothing") + "writes the true one",
    ),
    Code(
        "wrong-dim",
        WARNING,
        "ss_network_dim is the rank of no module.",
        _FIX.format("wrong-dim") + "writes the rank that the modules have",
    ),
    Code(
        "wrong-alpha",
        WARNING,
        "ss_network_alpha is the alpha of no module.",
        _FIX.format("wrong-alpha") + "writes the alpha that the modules have",
    ),
    Code(
        "two-scales",
        ERROR,
        "The scale is told twice, by alphas and by PEFT's metadata: diffusers refuses the file.",
        _FIX.format("two-scales") + "keeps the metadata, where both say the same",
    ),
)


def _run(content: Content) -> Iterator[Finding]:
    metadata = content.bundle.metadata
    if metadata.get(MODEL_HASH, "").lower().removeprefix("0x") == EMPTY_SHA256:
        message = f"{MODEL_HASH} is the sha256 of no data"
        yield CHECK.finding("hash-of-nothing", message, content.path, key=MODEL_HASH)
    adapter = content.reading.adapter
    if adapter is None or not adapter.modules:
        return
    yield from _two_scales(content, adapter)
    told = list(_alphas(content, adapter))
    yield from told
    ranked = [module for module in adapter.modules if has_rank(module)]
    if not any(finding.code == "diluted-concat" for finding in told):
        yield from _merged(content, adapter)
        yield from _stated(content, DIM, "wrong-dim", {float(module.rank) for module in ranked})
    if not told:
        yield from _stated(content, ALPHA_ENTRY, "wrong-alpha", {alpha_of(module) for module in ranked})


def _alphas(content: Content, adapter: Adapter) -> Iterator[Finding]:
    """What happened to the alphas, where the header says what they were."""
    metadata, modules = content.bundle.metadata, main_modules(adapter)
    if not modules or (DIM not in metadata and ALPHA_ENTRY not in metadata):
        return
    stated, dim = number(metadata.get(ALPHA_ENTRY)), number(metadata.get(DIM))
    key = modules[0].keys[ALPHA]
    lacks = metadata.get(ALPHA_ENTRY) == "None"
    if all(alpha_of(m) == 1 and m.rank > 1 for m in modules) and (lacks or (stated is not None and stated != 1)):
        message = f"every alpha is 1, {ALPHA_ENTRY} says {metadata[ALPHA_ENTRY]}: the update is too weak"
        yield CHECK.finding("alpha-became-one", message, content.path, key=key)
    elif stated is None or not dim or stated <= 0:
        return
    elif stated != dim and all(m.rank == dim and _near(alpha_of(m), stated * stated / dim) for m in modules):
        message = f"the alphas are {alpha_of(modules[0]):g}, {ALPHA_ENTRY} says {stated:g} at rank {dim:g}"
        yield CHECK.finding("scale-twice", message, content.path, key=key)
    elif _names(metadata) > 1 and all(_grown(m, dim) and _near(alpha_of(m), stated) for m in modules):
        times = modules[0].rank / dim
        message = f"the rank is {modules[0].rank}, {times:g} times {DIM}, the alpha still {stated:g}: "
        message += f"the update is {1 / times:.3g} of what it should be"
        yield CHECK.finding("diluted-concat", message, content.path, key=key)
    else:
        yield from _rounded(content, modules, stated)


def _rounded(content: Content, modules: Sequence[Module], stated: float) -> Iterator[Finding]:
    found = []
    for module in modules:
        dtype = content.bundle.tensors[module.keys[ALPHA]].dtype
        narrow = dtype in ("F16", "BF16", "F8_E4M3", "F8_E5M2")
        if narrow and alpha_of(module) != stated and LazyTensor.scalar(stated, dtype).item() == alpha_of(module):
            found.append((module, dtype))
    if found:
        module, dtype = found[0]
        message = f"{len(found)} alphas are {alpha_of(module):g}, which is {stated:g} in {dtype}"
        yield CHECK.finding("alpha-rounded", message, content.path, key=module.keys[ALPHA])


def _merged(content: Content, adapter: Adapter) -> Iterator[Finding]:
    metadata = content.bundle.metadata
    dim = number(metadata.get(DIM))
    same_rank = dim is not None and all(module.rank == dim for module in main_modules(adapter))
    if _names(metadata) and RECIPE not in metadata and same_rank and main_modules(adapter):
        message = f"was merged from {metadata[_MERGED]}, at the rank that they had"
        yield CHECK.finding("merged-factors", message, content.path, key=_MERGED)


def _stated(content: Content, entry: str, code: str, true: set[float]) -> Iterator[Finding]:
    stated = number(content.bundle.metadata.get(entry))
    if stated is not None and true and not any(_near(value, stated) for value in true):
        shown = ", ".join(f"{value:g}" for value in sorted(true)[:4]) + (", ..." if len(true) > 4 else "")
        yield CHECK.finding(code, f"{entry} is {stated:g}, the modules have {shown}", content.path, key=entry)


def _two_scales(content: Content, adapter: Adapter) -> Iterator[Finding]:
    keys = [module.keys[ALPHA] for module in adapter.modules if ALPHA in module.keys]
    if keys and PEFT_METADATA in content.bundle.metadata and adapter.layout == "diffusers":
        message = f"has {len(keys)} alphas, and {PEFT_METADATA} in the header"
        yield CHECK.finding("two-scales", message, content.path, key=keys[0])


def _names(metadata: Mapping[str, str]) -> int:
    """How many files the header says were merged."""
    return len([name for name in metadata.get(_MERGED, "").split(",") if name.strip()])


def _grown(module: Module, dim: float) -> bool:
    return module.rank > dim and module.rank % dim == 0


def _near(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=_SAME)


CHECK = Check("producer", "Known faults of the programs that wrote it", "content", _CODES, _run)
