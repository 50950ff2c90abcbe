"""Spell: an adapter as a bundle of a layout, whatever grouping its modules came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import NotRepresentable, UnknownModel, UsageError, few
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.naming import Naming
from loratool.core.registry import layouts
from loratool.core.target import same_shape
from loratool.core.tensor import LazyTensor
from loratool.ops import origin
from loratool.ops.regroup import Blocks, Regrouped, regroup

HEADER_ROOM = 1 << 20
"""Tensors that are no modules ride along in the header up to this many bytes."""


@dataclass(frozen=True)
class Extras:
    """Where the tensors go that are no modules: into the file, into its header, or (by name) nowhere."""

    in_file: Mapping[str, LazyTensor] = field(default_factory=dict)
    in_header: Mapping[str, LazyTensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spelled:
    """An adapter grouped and shaped as a layout writes it, and the layout's own bundle, extras not in it."""

    adapter: Adapter
    bundle: Bundle
    layout: Layout
    extras: Extras
    vanished: tuple[str, ...]
    blocks: Blocks


def spell(adapter: Adapter, to: str, *, drop_extras: bool = False) -> Spelled:
    """The adapter in the layout `to`, module by module the same update; nothing is computed before it is written.

    Raises what `check_writable` and `regrouped` do, and NotRepresentable for extras that find no place.
    """
    layout = check_writable(adapter, to)
    groups = regrouped(adapter, layout)
    spoken = replace(adapter, modules=layout.ready([shaped(module) for module in groups.modules]))
    written = layout.write(spoken)
    extras = _place(adapter, layout, drop_extras)
    as_written = replace(spoken, layout=layout.id, extras=extras.in_file)
    return Spelled(as_written, written, layout, extras, groups.vanished, groups.blocks)


def check_writable(adapter: Adapter, to: str) -> Layout:
    """The layout `to`. Raises NotRepresentable for modules that it cannot express, UsageError if it is only read."""
    layout = layouts()[to]
    if adapter.unread_families and not adapter.modules:
        kinds = ", ".join(f"{count} {family}" for family, count in sorted(adapter.unread_families.items()))
        raise NotRepresentable(f"holds no module that can be read yet, only {kinds}")
    if not layout.writable:
        writable = ", ".join(sorted(known.id for known in layouts().values() if known.writable))
        raise UsageError(f"the layout {to} is only read", hint=f"write one of: {writable}")
    # Before regrouping, which may fail on a module that the layout cannot express anyway: this error knows a way out.
    layout.refuse(adapter.modules)
    return layout


def regrouped(adapter: Adapter, layout: Layout, ticket: origin.Ticket | None = None) -> Regrouped:
    """The modules as `layout` groups them: by the voices it writes, or by those of a ticket back.

    Raises NotExact for families that cannot be cut as `layout` needs it, UnknownModel for flattened names without a
    model.
    """
    return regroup(adapter.modules, namings_for(adapter, layout, ticket), ticket.blocks if ticket else None)


def namings_for(adapter: Adapter, layout: Layout, ticket: origin.Ticket | None = None) -> dict[str, Naming]:
    """By which names `layout` groups the modules of each component. Raises UnknownModel as `regrouped` does."""
    if adapter.architecture.id == "unknown" and layout.id != adapter.layout:
        raise UnknownModel(
            "the model is unknown and its names are flattened, so that no other spelling can be derived",
            hint="; ".join(adapter.notes) or "name a checkpoint with --base, or the model with --architecture",
        )
    voices = {**layout.voices_for(adapter), **(ticket.spoken() if ticket else {})}
    return {c: adapter.architecture.naming(c, voices[c].naming) for c in adapter.components}


def shaped(module: Module) -> Module:
    """Factors as many-dimensional as the weight they update: a 1x1 convolution may be stored as a linear, and back."""
    if module.family.id != "lora" or "up" not in module.factors or "mid" in module.factors:
        return module
    standard = module.targets[0].shape
    up, down = module.factors["up"], module.factors["down"]
    if len(standard) == len(down.shape) or not same_shape(down.shape, down.shape[:2]):
        return module
    ones = (1,) * (len(standard) - 2)
    if any(size != 1 for size in standard[2:]):
        return module
    factors = {"up": up.reshape((*up.shape[:2], *ones)), "down": down.reshape((*down.shape[:2], *ones))}
    magnitude = module.magnitude
    if magnitude is not None:
        magnitude = magnitude.reshape((*magnitude.shape[:2], *ones))
    return replace(module, factors={**module.factors, **factors}, magnitude=magnitude)


def _place(adapter: Adapter, layout: Layout, drop: bool) -> Extras:
    if not adapter.extras:
        return Extras()
    if layout.id == adapter.layout:
        return Extras(adapter.extras)
    if drop:
        return Extras(dropped=tuple(adapter.extras))
    size = sum(tensor.nbytes for tensor in adapter.extras.values())
    if size <= HEADER_ROOM:
        return Extras(in_header=adapter.extras)
    names = tuple(adapter.extras)
    raise NotRepresentable(
        f"{len(names)} tensors are no modules that {layout.id} can hold ({few(names)}; {size / 2**20:.1f} MiB)",
        modules=names,
        hint="leave them out with --drop-extras",
    )
