"""fix: mends what producers are known to get wrong, each fault by its own rule, in the file's own layout."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from loratool.core.adapter import PEFT_METADATA, Adapter, Bundle
from loratool.core.errors import UsageError
from loratool.core.finding import WARNING, Finding
from loratool.core.layout import ALPHA
from loratool.core.module import Module
from loratool.core.network import ALPHA_ENTRY, DIM, alpha_of, expected_alpha, main_modules
from loratool.core.program import Program
from loratool.core.registry import layouts
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.files.bundle import check_output, read_bundle, write_bundle
from loratool.files.safetensors import MODEL_HASH
from loratool.ops import recipe
from loratool.ops.conformance import IGNORED, conform
from loratool.ops.headers import PLACEHOLDER, STALE, commonest, with_history
from loratool.ops.open import open_adapter
from loratool.ops.validate import validate

UNREAD_ENCODER = "text-encoder-unread"
"""Modules of a text encoder that the program of `--for` does not load."""

_LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Mended:
    """One kind of fault: what was found, and what was done about it. `fixed` is empty where nothing can be done."""

    code: str
    message: str
    count: int
    fixed: str


@dataclass(frozen=True)
class FixReport:
    """What a file had, and what was mended. `output` is None where nothing was to be mended, or only planned."""

    source: str
    output: str | None
    layout: str
    architecture: str
    mended: tuple[Mended, ...]
    left: tuple[Mended, ...]
    modules_before: int
    modules_after: int
    size: int
    seconds: float


class _Cannot(Exception):
    """A fault that this file's fault cannot be mended of, and why."""


@dataclass(frozen=True)
class _Patient:
    """The file while it is mended: `unread` are modules that a program passes over."""

    adapter: Adapter
    bundle: Bundle
    unread: tuple[Module, ...] = ()


Mend = Callable[[_Patient, str], tuple[Bundle, str]]
"""Gives the bundle without the fault, and says what was done. Raises _Cannot."""


def fix_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    only: Sequence[str] = (),
    program: Program | None = None,
    overwrite: bool = False,
) -> FixReport:
    """Writes the file at `path` without the faults in FIXES (those of `only`, if any are named); None only plans it.

    Everything else keeps its bytes: keys, dtypes, metadata. Factors change only where they are beyond fp16, by powers
    of two, so that the update keeps its bits. With `program`, modules of text encoders that it does not load are left
    out. Raises UsageError for a code that has no fix, FormatError for what is no adapter.
    """
    started = time.perf_counter()
    for code in only:
        if code not in FIXES:
            raise UsageError(f"nothing mends {code!r}", hint=f"known: {', '.join(FIXES)}")
    if UNREAD_ENCODER in only and program is None:
        raise UsageError(f"{UNREAD_ENCODER} depends on the program", hint="name it with --for")
    adapter = open_adapter(path)
    folder = layouts()[adapter.layout].folder
    if output is not None:
        check_output(output, [os.fspath(path)], folder, overwrite)
    patient = _Patient(adapter, read_bundle(path), _unread(adapter, program))
    mended: list[Mended] = []
    left: list[Mended] = []
    for code, (message, count) in _faults(path, patient, program).items():
        if only and code not in only:
            continue
        try:
            bundle, done = FIXES[code](patient, code)
        except _Cannot as reason:
            left.append(Mended(code, message, count, str(reason)))
            continue
        mended.append(Mended(code, message, count, done))
        patient = replace(patient, bundle=bundle, adapter=_again(adapter, bundle))
    written = output is not None and bool(mended)
    if written:
        assert output is not None
        _write(output, patient.bundle, [one.code for one in mended], folder, overwrite)
    return FixReport(
        source=os.fspath(path),
        output=os.fspath(output) if output is not None and written else None,
        layout=adapter.layout,
        architecture=adapter.architecture.id,
        mended=tuple(mended),
        left=tuple(left),
        modules_before=len(adapter.modules),
        modules_after=len(patient.adapter.modules),
        size=os.path.getsize(output) if output is not None and written and not folder else 0,
        seconds=time.perf_counter() - started,
    )


def _faults(path: str | os.PathLike[str], patient: _Patient, program: Program | None) -> dict[str, tuple[str, int]]:
    """Code -> the first message and how many there are, of what can be mended, in the order of FIXES."""
    found: dict[str, list[Finding]] = {}
    for result in validate(path, deep=True):
        for finding in result.findings:
            found.setdefault(finding.code, []).append(finding)
    if patient.unread and program is not None:
        message = f"{program.title} does not load {len(patient.unread)} modules of a text encoder"
        found[UNREAD_ENCODER] = [Finding(UNREAD_ENCODER, WARNING, message)] * len(patient.unread)
    return {code: (found[code][0].message, len(found[code])) for code in FIXES if code in found}


def _unread(adapter: Adapter, program: Program | None) -> tuple[Module, ...]:
    if program is None:
        return ()
    fates = conform(adapter, program).fates
    pairs = zip(adapter.modules, fates, strict=True)
    return tuple(m for m, fate in pairs if fate.outcome == IGNORED and m.component.startswith("text_encoder"))


def _again(adapter: Adapter, bundle: Bundle) -> Adapter:
    return layouts()[adapter.layout].read(bundle, adapter.architecture)


def _write(
    output: str | os.PathLike[str], bundle: Bundle, mended: Sequence[str], folder: bool, overwrite: bool
) -> None:
    metadata = {key: value for key, value in bundle.metadata.items() if key not in (*STALE, recipe.ENTRY)}
    metadata = with_history(metadata, {"op": "fix", "codes": list(mended)})
    hashes = MODEL_HASH in metadata
    if hashes:
        metadata |= {MODEL_HASH: PLACEHOLDER, "sshs_legacy_hash": PLACEHOLDER[:8]}
    write_bundle(output, replace(bundle, metadata=metadata), folder=folder, overwrite=overwrite, hashes=hashes)


# -- fixes ------------------------------------------------------------------------------------------------------------


def _alphas(patient: _Patient, code: str) -> tuple[Bundle, str]:
    """The alphas that the header tells, in their dtype where it holds them, else in float32."""
    bundle = patient.bundle
    tensors = dict(bundle.tensors)
    values: Counter[float] = Counter()
    for module in main_modules(patient.adapter):
        alpha = expected_alpha(code, bundle.metadata, module)
        old = tensors[module.keys[ALPHA]]
        new = LazyTensor.scalar(alpha, old.dtype)
        if new.item() != alpha:
            new = LazyTensor.scalar(alpha, "F32")
        tensors[module.keys[ALPHA]] = new.reshape(old.shape)
        values[alpha] += 1
    told = ", ".join(f"{value:g}" for value, _ in values.most_common(3))
    return replace(bundle, tensors=tensors), f"set the alpha of {sum(values.values())} modules to {told}"


def _true_entry(patient: _Patient, code: str) -> tuple[Bundle, str]:
    """The header's dim or alpha as the modules have it."""
    entry, of = (DIM, lambda m: float(m.rank)) if code == "wrong-dim" else (ALPHA_ENTRY, alpha_of)
    values = Counter(of(module) for module in main_modules(patient.adapter) or patient.adapter.modules)
    value = commonest(values, patient.bundle.metadata[entry])
    return _with_entry(patient.bundle, entry, value), f"set {entry} to {value}"


def _with_entry(bundle: Bundle, entry: str, value: str) -> Bundle:
    return replace(bundle, metadata={**bundle.metadata, entry: value})


def _true_hash(patient: _Patient, code: str) -> tuple[Bundle, str]:
    """What is written is hashed whenever there is the entry."""
    return _with_entry(patient.bundle, MODEL_HASH, PLACEHOLDER), f"wrote the true {MODEL_HASH}"


def _without_zero(patient: _Patient, code: str) -> tuple[Bundle, str]:
    """The modules whose update is zero, left out: none of them changes anything."""
    dead = [module for module in patient.adapter.modules if _is_zero(module)]
    if len(dead) == len(patient.adapter.modules):
        raise _Cannot("nothing would be left")
    return _without(patient.bundle, dead), f"left out {len(dead)} modules"


def _is_zero(module: Module) -> bool:
    if "bias" in module.factors:
        return False
    return any(not bool(factor.load().float().any()) for factor in module.factors.values())


def _without(bundle: Bundle, modules: Sequence[Module]) -> Bundle:
    gone = {key for module in modules for key in module.keys.values()}
    return replace(bundle, tensors={key: tensor for key, tensor in bundle.tensors.items() if key not in gone})


def _balanced(patient: _Patient, code: str) -> tuple[Bundle, str]:
    """A power of two moved from one factor to the other, until both are within fp16: no bit of the update changes."""
    tensors = dict(patient.bundle.tensors)
    moved = 0
    for module in patient.adapter.modules:
        if module.factors.keys() - {"bias"} != {"up", "down"}:
            continue
        sizes = {role: _peak(module.factors[role]) for role in ("up", "down")}
        if max(sizes.values()) <= _LARGEST_FP16:
            continue
        large, small = sorted(sizes, key=lambda role: -sizes[role])
        steps = math.floor((math.log2(sizes[large]) - math.log2(max(sizes[small], 2.0**-14))) / 2)
        if sizes[large] * 2.0**-steps > _LARGEST_FP16 or steps <= 0:
            raise _Cannot(f"{module.title}: neither factor could be within fp16; store it as bf16 or fp32")
        for role, power in ((large, -steps), (small, steps)):
            tensors[module.keys[role]] = _shifted(module, role, power)
        moved += 1
    if not moved:
        raise _Cannot("only pairs of up and down can be balanced")
    return replace(patient.bundle, tensors=tensors), f"moved powers of two between the factors of {moved} modules"


def _peak(factor: LazyTensor) -> float:
    return float(factor.load().float().abs().max()) if factor.numel else 0.0


def _shifted(module: Module, role: str, power: int) -> LazyTensor:
    """A factor times a power of two. Raises _Cannot where that would round."""
    factor = module.factors[role]
    before = factor.load()
    after = torch.ldexp(before.double(), torch.tensor(power)).to(torch_dtype(factor.dtype))
    if not torch.equal(torch.ldexp(after.double(), torch.tensor(-power)), before.double()):
        raise _Cannot(f"{module.title}: {factor.dtype} cannot hold the balanced factor without rounding")
    return LazyTensor.from_torch(after)


def _one_scale(patient: _Patient, code: str) -> tuple[Bundle, str]:
    """Without the alphas, where PEFT's metadata say the same."""
    before = patient.adapter.modules
    gone = {module.keys[ALPHA] for module in before if ALPHA in module.keys}
    kept = {key: tensor for key, tensor in patient.bundle.tensors.items() if key not in gone}
    bundle = replace(patient.bundle, tensors=kept)
    for module, told in zip(before, _again(patient.adapter, bundle).modules, strict=True):
        if not math.isclose(told.scale, module.scale, rel_tol=1e-6):
            raise _Cannot(f"{module.title}: the alpha gives {module.scale:g}, the metadata another scale")
    return bundle, f"left out {len(gone)} alphas, which {PEFT_METADATA} holds, too"


def _without_unread(patient: _Patient, code: str) -> tuple[Bundle, str]:
    if len(patient.unread) == len(patient.adapter.modules):
        raise _Cannot("nothing would be left")
    return _without(patient.bundle, patient.unread), f"left out {len(patient.unread)} modules"


FIXES: Mapping[str, Mend] = {
    "alpha-became-one": _alphas,
    "scale-twice": _alphas,
    "diluted-concat": _alphas,
    "alpha-rounded": _alphas,
    "two-scales": _one_scale,
    "wrong-dim": _true_entry,
    "wrong-alpha": _true_entry,
    "zero-module": _without_zero,
    "fp16-factor": _balanced,
    UNREAD_ENCODER: _without_unread,
    "hash-of-nothing": _true_hash,
}
"""Code of a finding -> what mends it, in the order in which that is done."""
