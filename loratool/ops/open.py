"""Opening: from a path to an Adapter."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple

from loratool.core.adapter import Adapter, Bundle
from loratool.core.architecture import Architecture
from loratool.core.detect import Detection, detect
from loratool.core.errors import FormatError, LoratoolError, UnknownModel, UsageError
from loratool.core.identify import what_it_is
from loratool.core.registry import architectures, layouts
from loratool.files.bundle import read_bundle


class Opened(NamedTuple):
    """An adapter and how it was recognised."""

    adapter: Adapter
    detection: Detection


def open_adapter(
    path: str | os.PathLike[str], *, architecture: Architecture | str | None = None, layout: str | None = None
) -> Adapter:
    """The adapter at `path` (a file or a PEFT folder). Reads headers, side files and alpha scalars, nothing else.

    `architecture` and `layout` say what it is instead of letting it be detected. Raises FormatError for what is no
    adapter, with what it is instead where that can be told.
    """
    return open_detected(path, architecture=architecture, layout=layout).adapter


def open_detected(
    path: str | os.PathLike[str], *, architecture: Architecture | str | None = None, layout: str | None = None
) -> Opened:
    """As `open_adapter`, with how it was recognised."""
    bundle = read_bundle(path)
    try:
        return understand(bundle, _named(architecture), layout)
    except LoratoolError as error:
        raise error.with_file(str(path)) from error.__cause__


def _named(architecture: Architecture | str | None) -> Architecture | None:
    if not isinstance(architecture, str):
        return architecture
    return architectures()[_known(architecture, "architecture", architectures())]


def understand(bundle: Bundle, architecture: Architecture | None = None, layout: str | None = None) -> Opened:
    """The adapter in a bundle. Raises FormatError if there is none."""
    other = None if architecture else what_it_is(bundle)
    if other is not None:
        raise FormatError(f"is {other.what}, not a LoRA", hint=other.hint)
    among = None if architecture is None else [architecture]
    found = detect(bundle, among, layout)
    if found is None:
        raise FormatError(
            f"holds no key of an adapter (first key: {next(iter(bundle.tensors), 'none')!r})",
            hint="it is no LoRA, or of a kind that is not known yet",
        )
    before = _converted_from(bundle, found) if architecture is None and (found.tie or found.others) else None
    if before is not None:
        return understand(bundle, before, layout)
    best = found.best
    if architecture is not None and best.architecture not in architecture.sizes:  # less than half are names of it
        named = next((one for one in found.candidates if one.architecture in architecture.sizes), None)
        if named is None:
            hint = "leave --architecture or --base out to have it detected"
            raise UnknownModel(f"no key is a name of {architecture.title}", hint=hint)
        best = named
    adapter = best.layout.read(bundle, best.architecture, best.parsed)
    if not adapter.modules and not adapter.unread_families:
        raise FormatError("holds no module that can be read", hint="its keys are like a LoRA's, but none is complete")
    if found.tie:
        models = ", ".join(found.tie)
        note = f"could be any of {models}: nothing in the file tells them apart; name one with --architecture"
        adapter = replace(adapter, notes=(*adapter.notes, note))
    if found.others:
        note = f"may be for {' or '.join(found.others)} as well, whose names are the same; --architecture tells"
        adapter = replace(adapter, notes=(*adapter.notes, note))
    return Opened(adapter, found)


def _converted_from(bundle: Bundle, found: Detection) -> Architecture | None:
    """The model that a converted file had been taken for, where its names could be several models'."""
    from loratool.ops import origin

    ticket = origin.decode(bundle.metadata)
    if ticket is None or ticket.architecture not in {one.architecture.id for one in found.candidates}:
        return None
    return architectures().get(ticket.architecture)


def layout_named(name: str) -> str:
    """The id of a layout. Raises UsageError with the nearest and the known ones."""
    other = {alias: layout.id for layout in layouts().values() for alias in layout.names}
    return other.get(name) or _known(name, "layout", layouts())


def _known(name: str, what: str, known: Collection[str]) -> str:
    if name in known:
        return name
    near = get_close_matches(name.lower(), known, 1, 0.5)
    nearest = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"no {what} is called {name!r}", hint=f"{nearest}known: {', '.join(sorted(known))}")
