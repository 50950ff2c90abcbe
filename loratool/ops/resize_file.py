"""resize, from file to file, with its report as data."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.errors import LoratoolError, UsageError
from loratool.core.module import Module
from loratool.core.registry import layouts
from loratool.files.bundle import check_output
from loratool.ops import recipe
from loratool.ops.blocks import places
from loratool.ops.convert import cast
from loratool.ops.decompose import decompose
from loratool.ops.made import Held, Made, Progress, make, save_made, told
from loratool.ops.open import open_adapter
from loratool.ops.ranks import Limits, Rule, check_limits
from loratool.ops.recipe import file_name
from loratool.ops.resize import Cut, Norms, OwnRule, Resized, resize, total_error
from loratool.ops.spectrum import Spectrum


@dataclass(frozen=True)
class Outcome:
    """What one rule made: `output` is None in a dry run. Sizes in bytes; `error` is the relative error (Frobenius) of
    the whole adapter by truncation, `held` what reading the file back showed (None if it was not asked for)."""

    rule: str
    output: str | None
    modules: tuple[Cut, ...]
    ranks_after: Mapping[int, int]
    size_after: int
    energy: float
    error: float
    dropped: tuple[str, ...]
    held: Held | None


@dataclass(frozen=True)
class ResizeReport:
    """What `loratool resize` did. `values` are the singular values of every module, in its order; `blocks` the places
    of the modules of every block, labels in model order; `seconds` wall time, of which `seconds_decompose` were spent
    on the one decomposition that all rules share."""

    source: str
    layout_before: str
    layout_after: str
    architecture: str
    architecture_title: str
    ranks_before: Mapping[int, int]
    size_before: int
    base: str | None
    dora: int
    unread_families: Mapping[str, int]
    notes: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    blocks: Mapping[str, tuple[int, ...]]
    outcomes: tuple[Outcome, ...]
    seconds_decompose: float
    seconds: float


def resize_file(
    path: str | os.PathLike[str],
    rules: Sequence[Rule],
    output: str | os.PathLike[str] | None,
    *,
    to: str | None = None,
    dtype: str | None = None,
    limits: Limits | None = None,
    own: OwnRule | None = None,
    per_block: Mapping[str, Any] | None = None,
    base: str | None = None,
    architecture: Architecture | str | None = None,
    drop_extras: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    verify: bool = True,
    name: str | None = None,
    base_name: str | None = None,
    progress: Progress | None = None,
) -> ResizeReport:
    """Resizes the adapter at `path` by each of the rules, which share one decomposition; `output` None writes nothing.

    With several rules `output` holds `{rule}`. The layout is the input's or `to`; see `resize` for the mathematics and
    `save_made` for what is checked. `per_block` is what the recipe says of `own`, `name` and `base_name` what it calls
    the input and the base (their names, if None). Raises UsageError for no rules or for outputs that coincide,
    LoratoolError for an output that cannot be written, before anything is read.
    """
    started = time.perf_counter()
    limits = limits or Limits()
    check_limits(limits)
    outputs = _outputs(rules, output)
    source = open_adapter(path, architecture=architecture)
    layout = to or source.layout
    for written in outputs:
        if written is not None:
            check_output(written, [os.fspath(path)], layouts()[layout].folder, overwrite)
    try:
        hashes = recipe.hashing([path], base)
        begun = time.perf_counter()
        ranked, vectors = _apart(source)
        spectra = decompose(ranked.modules, device, told(progress, "decomposing"))
        seconds_decompose = time.perf_counter() - begun
        norms = None
        if base is not None:
            from loratool.ops.norms import base_norms  # torch, which nothing else here needs on the CPU

            norms = base_norms(base, ranked, told(progress, "measuring the base"))
        digest, *of_base = hashes()
        told_input = {"name": name or file_name(path), "sha256": digest}
        settings = {
            **limits.settings(),
            "per_block": dict(per_block or {}),
            "base": None if base is None else {"name": base_name or file_name(base), "sha256": of_base[0]},
            "to": to,
            "dtype": dtype,
            "architecture": recipe.architecture_id(architecture),
            "drop_extras": drop_extras or None,
            "device": recipe.device_kind(device),
        }
        cut = []
        for rule in rules:
            made_by = recipe.recipe("resize", [told_input], {"rule": rule.title, **settings})
            cut.append(
                _resized(ranked, vectors, rule, spectra, layout, made_by, limits, dtype, norms, own, drop_extras)
            )
        # Only now, when every rule is known to have an answer, is anything written.
        expected = [[(module, 1.0)] for module in (*ranked.modules, *vectors)]
        outcomes = []
        for (resized, made), written in zip(cut, outputs, strict=True):
            held = None
            if written is not None:
                errors = [*(one.error for one in resized.cuts), *(0.0 for _ in vectors)]
                held = save_made(made, expected, errors, written, overwrite=overwrite, verify=verify, progress=progress)
            outcomes.append(_outcome(resized, made, written, held))
    except LoratoolError as error:
        raise error.with_file(os.fspath(path)) from error.__cause__
    return ResizeReport(
        source=source.path,
        layout_before=source.layout,
        layout_after=layout,
        architecture=source.architecture.id,
        architecture_title=source.architecture.title,
        ranks_before=dict(source.ranks.most_common()),
        size_before=source.size_bytes,
        base=base,
        dora=sum(module.magnitude is not None for module in source.modules),
        unread_families=source.unread_families,
        notes=source.notes,
        values=tuple(found.values for found in spectra),
        blocks=places(ranked),
        outcomes=tuple(outcomes),
        seconds_decompose=seconds_decompose,
        seconds=time.perf_counter() - started,
    )


def _outputs(rules: Sequence[Rule], output: str | os.PathLike[str] | None) -> list[str | None]:
    """The output of each rule."""
    if not rules:
        raise UsageError(
            "no rule says what ranks to keep", hint="for instance --rank 32, --energy 0.99 or --size 50MiB"
        )
    if output is None:
        return [None] * len(rules)
    pattern = os.fspath(output)
    if len(rules) > 1 and "{rule}" not in pattern:
        raise UsageError(
            f"{len(rules)} rules write {len(rules)} files", hint='put {rule} into -o: "name-{rule}.safetensors"'
        )
    names = [pattern.replace("{rule}", rule.label) for rule in rules]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError("two rules would write the same file", file=twice, hint="name each rule once")
    return list(names)


def _apart(source: Adapter) -> tuple[Adapter, tuple[Module, ...]]:
    """The adapter without the updates of norms and biases, which are vectors and stay as they are; and these."""
    vectors = tuple(module for module in source.modules if len(module.shape) == 1)
    matrices = tuple(module for module in source.modules if len(module.shape) > 1)
    return replace(source, modules=matrices), vectors


def _resized(
    source: Adapter,
    vectors: Sequence[Module],
    rule: Rule,
    spectra: Sequence[Spectrum],
    layout: str,
    made_by: Mapping[str, Any],
    limits: Limits,
    dtype: str | None,
    norms: Norms | None,
    own: OwnRule | None,
    drop_extras: bool,
) -> tuple[Resized, Made]:
    def made(modules: Sequence[Module]) -> Made:
        kept = vectors if dtype is None else [cast(module, dtype) for module in vectors]
        return make(replace(source, modules=(*modules, *kept)), layout, made_by, drop_extras=drop_extras)

    resized = resize(
        source,
        rule,
        limits=limits,
        dtype=dtype,
        spectra=spectra,
        norms=norms,
        own=own,
        written=lambda modules: made(modules).size_bytes,
    )
    return resized, made(resized.adapter.modules)


def _outcome(resized: Resized, made: Made, output: str | None, held: Held | None) -> Outcome:
    error = total_error(resized.cuts)
    return Outcome(
        rule=resized.rule.title,
        output=output,
        modules=resized.cuts,
        ranks_after=dict(made.adapter.ranks.most_common()),
        size_after=made.size_bytes,
        energy=1 - error * error,
        error=error,
        dropped=made.dropped,
        held=held,
    )
