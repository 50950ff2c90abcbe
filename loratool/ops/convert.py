"""convert: an adapter in another spelling, with the same update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import LoratoolError, NotRepresentable, UnknownModel, UsageError, few
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.registry import layouts
from loratool.core.target import same_shape
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.ops import origin
from loratool.ops.headers import converted_header, with_history
from loratool.ops.regroup import Regrouped, regroup

HEADER_ROOM = 1 << 20
"""Tensors that are no modules ride along in the header up to this many bytes."""


@dataclass(frozen=True)
class Converted:
    """A bundle ready to be written, the adapter it spells, and what a user should know about it.

    `returned` says that the bundle is the original of an earlier conversion; `carried` names extras that ride in the
    header, `dropped` those left out; `vanished` parts of fused modules that were zero. `hashes` says whether the
    header's hashes have to be made true when it is written.
    """

    bundle: Bundle
    adapter: Adapter
    layout: Layout
    returned: bool = False
    carried: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    hashes: bool = False


def convert(adapter: Adapter, to: str, *, dtype: str | None = None, drop_extras: bool = False) -> Converted:
    """The adapter in layout `to`, module by module the same update; nothing is computed before it is written.

    `dtype` (a safetensors code) casts the factors. Tensors that are no modules stay in the file where the layout is
    kept, ride in the header where they are small, or are dropped with `drop_extras`. Raises NotRepresentable for
    modules that `to` cannot express, NotExact for families that cannot be cut as `to` needs it, and LoratoolError
    for extras that find no place.
    """
    layout = layouts()[to]
    if not adapter.modules:
        kinds = ", ".join(f"{count} {family}" for family, count in sorted(adapter.unread_families.items()))
        raise NotRepresentable(f"holds no module that can be converted yet, only {kinds or 'other tensors'}")
    if not layout.writable:
        writable = ", ".join(sorted(known.id for known in layouts().values() if known.writable))
        raise UsageError(f"the layout {to} is only read", hint=f"convert to one of: {writable}")
    # Before regrouping, which may fail on a module that the layout cannot express anyway: this error knows a way out.
    layout.refuse(adapter.modules)
    if dtype is not None:
        adapter = replace(adapter, modules=tuple(_cast(module, dtype) for module in adapter.modules))
    elif (back := _return(adapter, layout)) is not None:
        return back
    regrouped = _regroup(adapter, layout, None)
    spoken = replace(adapter, modules=tuple(_shaped(module) for module in regrouped.modules))
    written = layout.write(spoken)
    place = _place_extras(adapter, layout, drop_extras)
    source = layouts()[adapter.layout]
    header = converted_header(spoken, source, layout, written.metadata)
    note = {"op": "convert", "from": source.id, "to": layout.id}
    note |= {"dtype": dtype} if dtype else {}
    header = with_history(header, note)
    ticket = replace(
        origin.ticket_for(replace(adapter, modules=tuple(_shaped(module) for module in adapter.modules)), source),
        fingerprint=origin.fingerprint(spoken.modules),
        extras={key: origin.packed(tensor) for key, tensor in place.in_header.items()},
        blocks=regrouped.blocks,
        order=tuple(adapter.metadata),
        metadata=origin.changes(adapter.metadata, {**header, origin.ENTRY: ""}),
    )
    header[origin.ENTRY] = origin.encode(ticket)
    return Converted(
        Bundle({**written.tensors, **place.in_file}, header, written.side_files),
        replace(spoken, layout=layout.id, extras=place.in_file),
        layout,
        carried=tuple(place.in_header),
        dropped=place.dropped,
        vanished=regrouped.vanished,
        hashes="sshs_model_hash" in header,
    )


def dtype_code(name: str) -> str:
    """safetensors' code for a dtype as people write it (fp16, bfloat16, F32). Raises UsageError for others."""
    code = _DTYPE_NAMES.get(name.lower())
    if code is None:
        raise UsageError(f"no dtype is called {name!r}", hint="known: fp32, fp16, bf16, fp64, fp8_e4m3, fp8_e5m2")
    return code


_DTYPE_NAMES = {
    **dict.fromkeys(("fp64", "float64", "f64"), "F64"),
    **dict.fromkeys(("fp32", "float32", "float", "f32"), "F32"),
    **dict.fromkeys(("fp16", "float16", "half", "f16"), "F16"),
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
    **dict.fromkeys(("fp8", "fp8_e4m3", "float8_e4m3fn", "f8_e4m3"), "F8_E4M3"),
    **dict.fromkeys(("fp8_e5m2", "float8_e5m2", "f8_e5m2"), "F8_E5M2"),
}


def _regroup(adapter: Adapter, layout: Layout, ticket: origin.Ticket | None) -> Regrouped:
    """The modules as `layout` groups them: by the voices it writes, or by those of a ticket back."""
    if adapter.architecture.id == "unknown" and layout.id != adapter.layout:
        raise UnknownModel(
            "the model is unknown and its names are flattened, so that no other spelling can be derived",
            hint="; ".join(adapter.notes) or "name a checkpoint with --base, or the model with --architecture",
        )
    voices = {**layout.voices_for(adapter), **(ticket.spoken() if ticket else {})}
    namings = {c: adapter.architecture.naming(c, voices[c].naming) for c in adapter.components}
    return regroup(adapter.modules, namings, ticket.blocks if ticket else None)


def _return(adapter: Adapter, layout: Layout) -> Converted | None:
    """The original of which `adapter` is a conversion, if it came from `layout` and is unchanged since."""
    ticket = origin.decode(adapter.metadata)
    if ticket is None or (ticket.layout, ticket.architecture) != (layout.id, adapter.architecture.id):
        return None
    if ticket.fingerprint != origin.fingerprint(adapter.modules):
        return None
    try:
        regrouped = _regroup(adapter, layout, ticket)
        spoken = replace(adapter, modules=regrouped.modules)
        written = layout.write(spoken, ticket.spoken())
        # The ticket says how this header differs from the original's: what is written today has no part in it.
        bundle = origin.restored(Bundle(written.tensors, adapter.metadata), ticket)
        bundle = replace(bundle, tensors={**bundle.tensors, **adapter.extras})
        again = layout.read(bundle, adapter.architecture)
    except (LoratoolError, LookupError, ValueError, TypeError, AttributeError):
        return None  # the ticket does not fit after all: convert as if there were none
    if not _alike(again.modules, regrouped.modules):
        return None
    return Converted(bundle, again, layout, returned=True, vanished=regrouped.vanished)


def _alike(left: tuple[Module, ...], right: tuple[Module, ...]) -> bool:
    """Whether the same targets have the same sizes and scales."""

    def facts(modules: tuple[Module, ...]) -> dict[tuple[str, ...], tuple[int, int]]:
        return {(m.component, *(t.path for t in m.targets)): (m.rank, m.parameters) for m in modules}

    if facts(left) != facts(right):
        return False
    scales = {(m.component, m.targets): m.scale for m in left}
    return all(abs(scales[m.component, m.targets] - m.scale) <= 1e-9 * abs(m.scale) for m in right)


def _shaped(module: Module) -> Module:
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
    shaped = {"up": up.reshape((*up.shape[:2], *ones)), "down": down.reshape((*down.shape[:2], *ones))}
    magnitude = module.magnitude
    if magnitude is not None:
        magnitude = magnitude.reshape((*magnitude.shape[:2], *ones))
    return replace(module, factors={**module.factors, **shaped}, magnitude=magnitude)


def _cast(module: Module, dtype: str) -> Module:
    return replace(
        module,
        factors={role: _cast_tensor(factor, dtype) for role, factor in module.factors.items()},
        magnitude=None if module.magnitude is None else _cast_tensor(module.magnitude, dtype),
    )


def _cast_tensor(tensor: LazyTensor, dtype: str) -> LazyTensor:
    if tensor.dtype == dtype:
        return tensor
    return LazyTensor.computed(tensor.shape, dtype, lambda: tensor.load().to(torch_dtype(dtype)))


@dataclass(frozen=True)
class _Extras:
    in_file: Mapping[str, LazyTensor]
    in_header: Mapping[str, LazyTensor]
    dropped: tuple[str, ...] = ()


def _place_extras(adapter: Adapter, layout: Layout, drop: bool) -> _Extras:
    """Where the tensors go that are no modules."""
    if not adapter.extras:
        return _Extras({}, {})
    if layout.id == adapter.layout:
        return _Extras(adapter.extras, {})
    if drop:
        return _Extras({}, {}, tuple(adapter.extras))
    size = sum(tensor.nbytes for tensor in adapter.extras.values())
    if size <= HEADER_ROOM:
        return _Extras({}, adapter.extras)
    names = tuple(adapter.extras)
    raise NotRepresentable(
        f"{len(names)} tensors are no modules that {layout.id} can hold ({few(names)}; {size / 2**20:.1f} MiB)",
        modules=names,
        hint="leave them out with --drop-extras",
    )
