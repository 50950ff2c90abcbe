"""Saving a conversion: written under a temporary name, read back, compared, and only then given its name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from loratool.core.adapter import Adapter
from loratool.core.errors import LoratoolError
from loratool.core.registry import layouts
from loratool.core.tensor import same_bytes
from loratool.files.bundle import read_bundle, write_bundle
from loratool.ops.compare import Difference, compare
from loratool.ops.convert import Converted

Progress = Callable[[str, int, int], None]


class NotTheSame(LoratoolError):
    """What was written does not say the same update as the input."""


@dataclass(frozen=True)
class Proof:
    """What reading the output back showed: updates compared, those with the same values, the largest relative error."""

    compared: int
    bitwise: int
    worst: float
    worst_module: str | None
    tolerance: float


def save(
    converted: Converted,
    source: Adapter,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Proof | None:
    """Writes a conversion of `source` to `path` and, with `verify`, proves that it says the same update.

    The proof reads the temporary file back from disk and compares every module's update with the input's, in
    float64. Raises NotTheSame, with nothing written, if one differs by more than rounding its factors can explain.
    """
    proofs: list[Proof] = []

    def check(written: str) -> None:
        proofs.append(_prove(converted, source, written, progress))

    def written(done: int, total: int) -> None:
        if progress is not None:
            progress("writing", done, total)

    write_bundle(
        path,
        converted.bundle,
        folder=converted.layout.folder,
        overwrite=overwrite,
        hashes=converted.hashes,
        progress=written,
        check=check if verify else None,
    )
    return proofs[0] if proofs else None


def _prove(converted: Converted, source: Adapter, path: str, progress: Progress | None) -> Proof:
    layout = layouts()[converted.layout.id]
    bundle = read_bundle(path)
    again = layout.read(bundle, converted.adapter.architecture)
    differences: list[Difference] = []
    for difference in compare(source.modules, again.modules):
        differences.append(difference)
        if progress is not None:
            progress("verifying", len(differences), len(source.modules))
    for key, tensor in converted.adapter.extras.items():
        if key not in bundle.tensors or not same_bytes(tensor, bundle.tensors[key]):
            raise NotTheSame("the written file does not hold the same bytes", key=key, hint="nothing was written")
    for found in differences:
        if not found.error <= found.tolerance:  # so that NaN is a difference, too
            raise NotTheSame(
                f"the written update differs by {found.error:.2g}, expected at most {found.tolerance:.2g}",
                key=found.title,
                hint=_advice(found, converted, source),
            )
    worst = max(differences, key=lambda found: found.error, default=None)
    return Proof(
        compared=len(differences),
        bitwise=sum(difference.bitwise for difference in differences),
        worst=worst.error if worst else 0.0,
        worst_module=worst.title if worst and worst.error else None,
        tolerance=worst.tolerance if worst else 0.0,
    )


def _advice(found: Difference, converted: Converted, source: Adapter) -> str:
    dtypes = {module.dtype for module in converted.adapter.modules} - {module.dtype for module in source.modules}
    if dtypes:
        return f"nothing was written: {'/'.join(sorted(dtypes))} cannot hold the values; choose another --dtype"
    if not math.isfinite(found.error):
        return "nothing was written: the file holds NaN or infinite values"
    return "nothing was written; please report this file"
