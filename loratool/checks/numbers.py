"""The numbers: NaN, infinity, what fp16 cannot hold, zeros, and hashes. Read in pieces, without a tensor library."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator, Mapping

from loratool.checks._values import FLOATS, FP16_OVERFLOW, Seen, largest, numbers, seen
from loratool.core.finding import ERROR, NOTE, WARNING, Check, Code, Finding, codes
from loratool.core.module import Module
from loratool.core.tensor import DTYPES, LazyTensor
from loratool.files.look import File
from loratool.files.safetensors import EMPTY_SHA256, MODEL_HASH, FileRange
from loratool.files.subjects import Content, byte_of

_SPEC_HASH = "modelspec.hash_sha256"
_EXACT = 8
"""So many modules whose update may overflow are computed; for the others the bound is told."""

_MOST_VALUES = 1 << 22
_PRODUCTS = frozenset({"lora", "loha", "lokr", "diff"})
_RETRAIN = "the training went wrong: use an earlier file"

_CODES = codes(
    Code("not-finite", ERROR, "A tensor holds NaN or infinity.", _RETRAIN),
    Code("fp16-factor", WARNING, "A factor holds numbers that fp16 turns into infinity.", "keep it in bf16 or fp32"),
    Code("fp16-update", WARNING, "The update, alpha included, is beyond what fp16 holds.", "keep it in bf16 or fp32"),
    Code("zero-module", WARNING, "A module is zero: it changes nothing.", "it was not trained, or the data are lost"),
    Code("zero-adapter", WARNING, "Every module is zero: the adapter changes nothing.", "use another file"),
    Code("hash-mismatch", ERROR, "The data are not those that a hash in the metadata is of.", "fetch the file again"),
    Code("numbers-skipped", NOTE, "The numbers were not read.", "--deep reads them"),
)


def _run(content: Content) -> Iterator[Finding]:
    if not content.deep:
        size = sum(file.handle.size for file in content.files)
        if content.skipped:
            message = f"the numbers were not read: {size / (1 << 30):.1f} GiB"
            yield CHECK.finding("numbers-skipped", message, content.path)
        return
    found: dict[str, Seen] = {}
    for key, tensor in content.bundle.tensors.items():
        found[key] = one = seen(tensor)
        if one.odd:
            message = f"holds {one.odd:,} of {tensor.numel:,} values that are NaN or infinite; the first is number "
            message += f"{one.first:,}"
            yield CHECK.finding("not-finite", message, content.path, key=key, byte=_place(tensor, one.first))
    adapter = content.reading.adapter
    if adapter is not None:
        yield from _modules(content, adapter.modules, found)
    for file in content.files:
        yield from _hashes(file)


def _place(tensor: LazyTensor, index: int) -> int | None:
    """The byte of its file at which a value stands."""
    source = tensor.source
    size = 4 if tensor.dtype == "C64" else max(DTYPES[tensor.dtype] // 8, 1)
    return source.start + index * size if isinstance(source, FileRange) else None


def _modules(content: Content, modules: tuple[Module, ...], found: Mapping[str, Seen]) -> Iterator[Finding]:
    zero = [module for module in modules if _is_zero(module, found)]
    if modules and len(zero) == len(modules):
        yield CHECK.finding("zero-adapter", f"all {len(modules)} modules are zero", content.path)
    for module in zero if len(zero) < len(modules) else ():
        role, key = next((r, k) for r, k in module.keys.items() if r in module.factors and _zero(found, k))
        message = f"{module.title} changes nothing: its {role} is zero"
        yield CHECK.finding("zero-module", message, content.path, key=key, byte=byte_of(content, key))
    exact = _EXACT
    for module in modules:
        for role, factor in module.factors.items():
            key = module.keys.get(role, "")
            if key in found and found[key].bound >= FP16_OVERFLOW and factor.dtype in FLOATS and factor.dtype != "C64":
                most, at = largest(factor)
                if most >= FP16_OVERFLOW:
                    message = f"holds {most:g}, which fp16 turns into infinity"
                    yield CHECK.finding("fp16-factor", message, content.path, key=key, byte=_place(factor, at))
        bound = _update_bound(module, found)
        if bound >= FP16_OVERFLOW and exact:
            exact -= 1
            most = _update(module)
            if most >= FP16_OVERFLOW:
                key = module.keys["up"]
                message = f"{module.title}: an entry of the update is {most:g}, fp16 ends at 65504"
                yield CHECK.finding("fp16-update", message, content.path, key=key, byte=byte_of(content, key))


def _zero(found: Mapping[str, Seen], key: str) -> bool:
    return key in found and found[key].zero


def _is_zero(module: Module, found: Mapping[str, Seen]) -> bool:
    """Whether a factor that is zero makes the update zero: where it is a product of its factors (a bias is added)."""
    if module.family.id not in _PRODUCTS:
        return False
    keys = [module.keys.get(role, "") for role in module.factors if role != "bias"]
    return "bias" not in module.factors and any(_zero(found, key) for key in keys)


def _update_bound(module: Module, found: Mapping[str, Seen]) -> float:
    """No entry of a pair's update is above this; 0 for what is no plain pair."""
    keys = [module.keys.get(role, "") for role in ("up", "down")]
    if module.factors.keys() - {"bias"} != {"up", "down"} or any(key not in found for key in keys):
        return 0.0
    up, down = (found[key] for key in keys)
    if up.odd or down.odd or any(factor.dtype not in FLOATS[:-1] for factor in module.factors.values()):
        return 0.0
    return up.bound * down.bound * module.rank * abs(module.scale)


def _update(module: Module) -> float:
    """The largest entry in the row of the update where `up` has its largest value, in float64."""
    up, down = module.factors["up"], module.factors["down"]
    if up.numel + down.numel > _MOST_VALUES or not math.isfinite(module.scale):
        return 0.0
    rank = down.shape[0]
    row = largest(up)[1] // rank
    left = numbers(bytes(up.read()), up.dtype)[row * rank : (row + 1) * rank]
    right = numbers(bytes(down.read()), down.dtype)
    width = len(right) // rank
    total = [0.0] * width
    for index, factor in enumerate(left):
        if factor:
            part = right[index * width : (index + 1) * width]
            total = [so_far + factor * value for so_far, value in zip(total, part, strict=True)]
    return max((abs(value) for value in total), default=0.0) * abs(module.scale)


def _hashes(file: File) -> Iterator[Finding]:
    if not file.sound or file.scan is None:
        return
    metadata = file.scan.metadata
    stated = {name: metadata[name].lower().removeprefix("0x") for name in (MODEL_HASH, _SPEC_HASH) if name in metadata}
    stated = {name: value for name, value in stated.items() if len(value) == 64}
    if not stated:
        return
    digest = hashlib.sha256()
    for piece in FileRange(file.handle, file.begin, file.handle.size - file.begin).chunks():
        digest.update(piece)
    for name, value in stated.items():
        if value == EMPTY_SHA256:  # that its writer hashed nothing is another finding
            continue
        if not hmac.compare_digest(value.encode(), digest.hexdigest().encode()):
            message = f"{name} is {value[:12]}..., the data have {digest.hexdigest()[:12]}...: bits have changed"
            yield CHECK.finding("hash-mismatch", message, file.path, key=name, byte=file.begin)


CHECK = Check("numbers", "The numbers", "content", _CODES, _run)
