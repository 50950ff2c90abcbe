"""Origin: the return ticket in a converted file's header, so that converting back gives the original back.

It holds what the other spelling cannot: the original's voices, keys and shapes where they are not what its layout
writes today, alpha's dtype, header entries and side files that changed, and small tensors that are no modules.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from loratool.core.adapter import Adapter, Bundle
from loratool.core.architecture import Voice
from loratool.core.errors import LoratoolError
from loratool.core.layout import ALPHA, Layout
from loratool.core.module import Module
from loratool.core.scale import at_scale, inner_took, stuck
from loratool.core.tensor import DTYPES, Held, LazyTensor

ENTRY = "loratool.origin"
MADE_WHEN_WRITTEN = ("sshs_model_hash", "sshs_legacy_hash")
"""Header entries that the writer fills in: their later values are not known when the ticket is made."""

MAX_EXPANDED = 64 << 20
"""A ticket that expands to more than 64 MiB is not one that we wrote."""


@dataclass(frozen=True)
class Ticket:
    """What it takes to go back. All fields are plain JSON.

    `keys` maps a key that the layout would write to `[key, shape, dtype]` of the original, or to None where the
    original had none; `scales` a module's targets to its scale, where the other layout has it in the factors; `added`
    and `extras` map keys to `[dtype, shape, base64]`; `metadata` maps header entries to their original value, or None
    where there was none, and `order` lists the original's; `fingerprint` tells whether the file is still as converted.
    """

    layout: str
    architecture: str
    voices: Mapping[str, tuple[str, str]]
    fingerprint: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    order: Sequence[str] = ()
    side_files: Mapping[str, str] = field(default_factory=dict)

    def spoken(self) -> dict[str, Voice]:
        """The voices of the original."""
        return {component: Voice(*voice) for component, voice in self.voices.items()}


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("layout", "architecture", "fingerprint"), str),
    "order": (list, tuple),
}
"""What a field must be; the others are maps."""


def encode(ticket: Ticket) -> str:
    """The header entry."""
    text = json.dumps({k: v for k, v in asdict(ticket).items() if v}, separators=(",", ":"), sort_keys=True)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def decode(metadata: Mapping[str, str]) -> Ticket | None:
    """The ticket in a header; None if there is none or it cannot be read (it is a convenience, never an error)."""
    try:
        packed = base64.b64decode(metadata[ENTRY], validate=True)
        text = zlib.decompressobj().decompress(packed, MAX_EXPANDED)
        ticket = Ticket(**json.loads(text))
    except (KeyError, ValueError, TypeError, zlib.error, RecursionError):
        return None
    sound = all(isinstance(value, _KINDS.get(name, dict)) for name, value in vars(ticket).items())
    texts = [*ticket.metadata.values(), *ticket.side_files.values()] if sound else [0]
    return ticket if all(text is None or isinstance(text, str) for text in texts) else None


def fingerprint(modules: Sequence[Module]) -> str:
    """Changes with any module's targets, shapes or dtypes: a resized or merged file cannot go back."""
    rows = sorted(
        json.dumps(
            [m.component, [t.path for t in m.targets], sorted((r, *t.shape, t.dtype) for r, t in m.tensors.items())]
        )
        for m in modules
    )
    import hashlib

    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def ticket_for(adapter: Adapter, layout: Layout) -> Ticket:
    """The ticket back to an adapter as it was read, by its `layout`; fingerprint and metadata are filled in later.

    The modules must have the shapes in which they will come back: where the file's differ, the ticket says so.
    """
    voices = {component: (voice.prefix, voice.naming) for component, voice in adapter.voices.items()}
    ticket = Ticket(layout.id, adapter.architecture.id, voices, side_files=dict(adapter.side_files))
    keys: dict[str, Any] = {}
    added: dict[str, Any] = {}
    try:
        for module in adapter.modules:
            spelled = layout.spell(module, adapter.architecture, adapter.voices)
            for role, (key, tensor) in spelled.items():
                stored = module.keys.get(role)
                if stored is None:
                    keys[key] = None
                    continue
                original = stored_tensor(adapter, module, role)
                if role == ALPHA and not _implied(module, original):
                    keys[key] = None
                    added[stored] = packed(original)
                elif (stored, original.shape, original.dtype) != (key, tensor.shape, tensor.dtype):
                    keys[key] = [stored, list(original.shape), original.dtype]
            for role in module.keys.keys() - spelled.keys():
                added[module.keys[role]] = packed(stored_tensor(adapter, module, role))
    except (LoratoolError, KeyError):
        return ticket  # the original is no spelling that its layout writes: the way back gives today's spelling
    return replace(ticket, keys=keys, added=added)


def scales(before: Sequence[Module], after: Sequence[Module]) -> dict[str, list[float]]:
    """Of modules whose scale the other layout has put into the factors, by component and targets: the scale, and 1
    where the inner factor took it."""
    now = {(target.component, target.path): module for module in after for target in module.targets}
    found: dict[str, list[float]] = {}
    for module in before:
        others = [now[place] for t in module.targets if (place := (t.component, t.path)) in now]
        if others and all(other.scale != module.scale for other in others):
            found[_name(module)] = [module.scale, float(inner_took(module, others[0]))]
    return found


def at_scales(modules: Sequence[Module], scales: Mapping[str, Sequence[float]]) -> tuple[Module, ...]:
    """Modules at the scales that they had, their factors as they were."""

    def back(module: Module) -> Module:
        scale, inner = scales.get(_name(module), (module.scale, 0.0))
        return module if stuck(module, scale) is not None else at_scale(module, scale, bool(inner))

    return tuple(map(back, modules))


def _name(module: Module) -> str:
    return f"{module.component}:{'+'.join(target.path for target in module.targets)}"


def _implied(module: Module, alpha: LazyTensor) -> bool:
    """Whether a stored alpha follows from the module's scale, which is all that other spellings keep of it."""
    try:
        again = LazyTensor.scalar(module.family.alpha(module.shapes, module.scale), alpha.dtype)
    except LoratoolError:  # no whole number, in an integer dtype
        return False
    return again.item() == alpha.item()


def stored_tensor(adapter: Adapter, module: Module, role: str) -> LazyTensor:
    """A module's tensor as it stood in the file."""
    return adapter.stored[module.keys[role]]


def packed(tensor: LazyTensor) -> list[Any]:
    """A tensor as JSON."""
    return [tensor.dtype, list(tensor.shape), base64.b64encode(tensor.read()).decode()]


def unpacked(value: Sequence[Any]) -> LazyTensor:
    """The tensor of `packed`."""
    dtype, shape, data = value
    tensor = LazyTensor(tuple(shape), str(dtype), Held(base64.b64decode(data)))
    if tensor.nbytes * 8 != tensor.numel * DTYPES[tensor.dtype]:
        raise ValueError(f"{tensor.nbytes} bytes cannot be {dtype} {shape}")
    return tensor


def restored(bundle: Bundle, ticket: Ticket) -> Bundle:
    """A bundle as its layout writes it today, with the keys, shapes, header and side files of the original."""
    tensors: dict[str, LazyTensor] = {}
    for key, tensor in bundle.tensors.items():
        change = ticket.keys.get(key, key)
        if change is None:
            continue
        if isinstance(change, str):
            tensors[key] = tensor
            continue
        name, shape, dtype = change
        if dtype != tensor.dtype and tensor.numel == 1:
            tensor = LazyTensor.scalar(tensor.item(), dtype)
        tensors[name] = tensor.reshape(tuple(shape))
    for values in (ticket.added, ticket.extras):
        tensors |= {key: unpacked(value) for key, value in values.items()}
    metadata = {key: value for key, value in bundle.metadata.items() if key not in ticket.metadata}
    metadata |= {key: value for key, value in ticket.metadata.items() if value is not None}
    ordered = {key: metadata.pop(key) for key in ticket.order if key in metadata}
    return replace(bundle, tensors=tensors, metadata={**ordered, **metadata}, side_files=dict(ticket.side_files))


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """What to set (or, None, to remove) in `after` to get `before`."""
    hashed = MADE_WHEN_WRITTEN if any(key in after for key in MADE_WHEN_WRITTEN) else ()
    return {
        key: before.get(key)
        for key in {**before, **after, **dict.fromkeys(hashed)}
        if before.get(key) != after.get(key) or key in hashed
    }
