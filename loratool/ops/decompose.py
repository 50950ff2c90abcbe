"""Decompose: the spectra of many modules, where there is most to compute with."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.core.module import Module
from loratool.ops.pool import Tick, each
from loratool.ops.spectrum import Spectrum, spectrum


def decompose(modules: Sequence[Module], device: str = "cpu", tick: Tick | None = None) -> list[Spectrum]:
    """The spectra of modules, in their order; each is read once. Computed in float64.

    On the CPU module by module in every thread; a GPU forms the Gram matrices of equal shapes in batches. Raises
    FormatError for a module with NaN or infinite values.
    """
    if device == "cpu":
        return each(spectrum, modules, tick)
    from loratool.ops.gpu import decompose_on

    return decompose_on(device, modules, tick)
