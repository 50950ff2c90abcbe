"""convert: an adapter in another spelling, with the same update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import LoratoolError, UsageError
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.registry import layouts
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.ops import origin
from loratool.ops.headers import converted_header, with_history
from loratool.ops.spell import check_writable, regrouped, shaped, spell


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
    if dtype is not None:
        adapter = replace(adapter, modules=tuple(cast(module, dtype) for module in adapter.modules))
    elif (back := _return(adapter, layout)) is not None:
        return back
    check_writable(adapter, to)
    spelled = spell(adapter, to, drop_extras=drop_extras)
    source, spoken, extras = layouts()[adapter.layout], spelled.adapter, spelled.extras
    header = converted_header(spoken, source, layout, spelled.bundle.metadata)
    note = {"op": "convert", "from": source.id, "to": layout.id}
    note |= {"dtype": dtype} if dtype else {}
    header = with_history(header, note)
    ticket = replace(
        origin.ticket_for(replace(adapter, modules=tuple(shaped(module) for module in adapter.modules)), source),
        fingerprint=origin.fingerprint(spoken.modules),
        extras={key: origin.packed(tensor) for key, tensor in extras.in_header.items()},
        blocks=spelled.blocks,
        scales=origin.scales(adapter.modules, spoken.modules),
        order=tuple(adapter.metadata),
        metadata=origin.changes(adapter.metadata, {**header, origin.ENTRY: ""}),
    )
    header[origin.ENTRY] = origin.encode(ticket)
    return Converted(
        replace(spelled.bundle, tensors={**spelled.bundle.tensors, **extras.in_file}, metadata=header),
        spoken,
        layout,
        carried=tuple(extras.in_header),
        dropped=extras.dropped,
        vanished=spelled.vanished,
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


def _return(adapter: Adapter, layout: Layout) -> Converted | None:
    """The original of which `adapter` is a conversion, if it came from `layout` and is unchanged since."""
    ticket = origin.decode(adapter.metadata)
    if ticket is None or (ticket.layout, ticket.architecture) != (layout.id, adapter.architecture.id):
        return None
    if ticket.fingerprint != origin.fingerprint(adapter.modules):
        return None
    try:
        groups = regrouped(adapter, layout, ticket)
        groups = replace(groups, modules=origin.at_scales(groups.modules, ticket.scales))
        spoken = replace(adapter, modules=groups.modules)
        written = layout.write(spoken, ticket.spoken())
        # The ticket says how this header differs from the original's: what is written today has no part in it.
        bundle = origin.restored(replace(written, metadata=adapter.metadata), ticket)
        bundle = replace(bundle, tensors={**bundle.tensors, **adapter.extras})
        again = layout.read(bundle, adapter.architecture)
    except (LoratoolError, LookupError, ValueError, TypeError, AttributeError):
        return None  # the ticket does not fit after all: convert as if there were none
    if not _alike(again.modules, groups.modules):
        return None
    return Converted(bundle, again, layout, returned=True, vanished=groups.vanished)


def _alike(left: tuple[Module, ...], right: tuple[Module, ...]) -> bool:
    """Whether the same targets have the same sizes and scales."""

    def facts(modules: tuple[Module, ...]) -> dict[tuple[str, ...], tuple[int, int]]:
        return {(m.component, *(t.path for t in m.targets)): (m.rank, m.parameters) for m in modules}

    if facts(left) != facts(right):
        return False
    scales = {(m.component, m.targets): m.scale for m in left}
    return all(abs(scales[m.component, m.targets] - m.scale) <= 1e-9 * abs(m.scale) for m in right)


def cast(module: Module, dtype: str) -> Module:
    """The module with its factors (and magnitude) rounded to `dtype`; constants, such as OFT's constraint, stay."""
    return replace(
        module,
        factors={
            role: _cast_tensor(factor, dtype) if factor.shape else factor for role, factor in module.factors.items()
        },
        magnitude=None if module.magnitude is None else _cast_tensor(module.magnitude, dtype),
    )


def _cast_tensor(tensor: LazyTensor, dtype: str) -> LazyTensor:
    if tensor.dtype == dtype:
        return tensor
    return LazyTensor.computed(tensor.shape, dtype, lambda: tensor.load().to(torch_dtype(dtype)))
