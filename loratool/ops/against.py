"""Against: what of an adapter has no place in a checkpoint, by names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import FormatError, LoratoolError
from loratool.files.checkpoint import CheckpointFiles, read_checkpoint
from loratool.ops.base import model_of
from loratool.ops.weights import BaseWeights, check_model, weights_in

if TYPE_CHECKING:
    from loratool.core.tolerant import Reading
    from loratool.files.subjects import Misfit

_NEAR = 8
"""So many modules that are missing are compared with all names of the checkpoint."""


@dataclass(frozen=True, eq=False)
class Fit:
    """How an adapter is understood beside a base, and what of it does not fit; `error` where the base is of no use."""

    reading: Reading
    misfits: tuple[Misfit, ...] = ()
    error: LoratoolError | None = None


def against(base: str, bundle: Bundle) -> Fit:
    """Reads an adapter as one for the model in the checkpoint at `base`. Headers only; never raises for a bad base."""
    from loratool.core.tolerant import understood

    reading = understood(bundle)
    try:
        checkpoint = read_checkpoint(base)
        model = model_of(checkpoint)
        found = reading.detection
        if found is not None and found.best.architecture.open:
            reading = understood(bundle, [model])
        elif found is not None and model.id != "generic":
            check_model(base, model, found.best.architecture)
    except LoratoolError as error:
        return Fit(reading, (), error)
    if reading.adapter is None:
        return Fit(reading)
    return Fit(reading, _misfits(checkpoint, reading.adapter))


def _misfits(checkpoint: CheckpointFiles, adapter: Adapter) -> tuple[Misfit, ...]:
    from loratool.files.subjects import Misfit

    weights = weights_in(checkpoint.path, checkpoint.components, adapter)
    missing = {id(module) for module in weights.missing(adapter.modules)}
    names = [key.removesuffix(".weight") for key in checkpoint.keys if key.endswith("weight")]
    found: list[Misfit] = []
    for module in adapter.modules:
        key = next(iter(module.keys.values()), module.title)
        if id(module) in missing:
            wanted = _wanted(weights, adapter, module.targets[0].path, len(found) < _NEAR, names)
            found.append(Misfit(key, f"{module.title} is not in {checkpoint.path}{wanted}", True))
            continue
        try:
            weights.spans(module)
        except FormatError as error:
            found.append(Misfit(key, error.message, False))
        except LoratoolError as error:
            found.append(Misfit(key, f"cannot be laid over the base: {error.message}", False))
    return tuple(found)


def _wanted(weights: BaseWeights, adapter: Adapter, path: str, compare: bool, names: list[str]) -> str:
    near = get_close_matches(path, names, 1, 0.6) if compare else []
    return f"; nearest: {near[0]}" if near else ""
