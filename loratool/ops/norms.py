"""Norms of base weights, by which the importance of an update can be measured."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loratool.core.adapter import Adapter
from loratool.core.errors import LoratoolError
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.files.atomic import atomic_write
from loratool.ops.pool import Tick, each
from loratool.ops.weights import BaseWeights, base_weights

STEPS = 40
"""Vectors of the Krylov space in which the spectral norm is looked for."""


def base_norms(
    path: str | os.PathLike[str], adapter: Adapter, tick: Tick | None = None
) -> dict[tuple[Target, ...], tuple[float, float]]:
    """Frobenius and spectral norm of every weight that `adapter` updates, in the checkpoint at `path`.

    Float32 with float64 sums; the spectral norm by Lanczos, good to about 1e-3, from below. Kept in
    `~/.cache/loratool/norms`, by the checkpoint's path, size and time. Raises what `base_weights` does.
    """
    # Norms do not change where a square weight is taken for its transpose.
    weights = replace(base_weights(path, adapter), transposed=False)
    cache = _Cache(path)
    known = cache.read()
    todo = [module for module in adapter.modules if _key(module) not in known]
    for module, norms in zip(todo, each(lambda module: _norms(weights, module), todo, tick), strict=True):
        known[_key(module)] = norms
    if todo:
        cache.write(known)
    return {module.targets: known[_key(module)] for module in adapter.modules}


def _norms(weights: BaseWeights, module: Module) -> tuple[float, float]:
    weight = weights.load(module)
    return float(weight.double().norm()), spectral_norm(weight)


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value, by Lanczos on matrix.T @ matrix from a fixed start, orthogonalised in full."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    steps = min(STEPS, matrix.shape[1])
    basis, images = matrix.new_zeros(matrix.shape[1], steps), matrix.new_zeros(matrix.shape[0], steps)
    x = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    for at in range(steps):
        x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
        for _ in range(2):
            x = x - basis @ (basis.T @ x)
        if float(x.norm()) < 1e-5:  # nothing new: the space is complete
            break
        basis[:, at] = x / x.norm()
        images[:, at] = matrix @ basis[:, at]
        x = matrix.T @ images[:, at]
    return float(torch.linalg.svdvals(images)[0])


def _key(module: Module) -> str:
    return "+".join([module.component, *(target.path for target in module.targets)])


class _Cache:
    """Norms of one checkpoint on disk. A convenience: whatever is wrong with it, it is left alone."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        place = Path(path)
        files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        name = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._file = Path(home) / "loratool" / "norms" / f"{name}.json"

    def read(self) -> dict[str, tuple[float, float]]:
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            found = {key: (float(whole), float(peak)) for key, (whole, peak) in stored.items()}
            return found if all(0 <= norm < math.inf for pair in found.values() for norm in pair) else {}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def write(self, norms: Mapping[str, tuple[float, float]]) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._file, overwrite=True) as file:
                file.write_text(json.dumps(norms), encoding="utf-8")
        except (OSError, LoratoolError):
            pass
