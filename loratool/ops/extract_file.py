"""extract, from two checkpoints to a file, with its report as data."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from loratool.core.adapter import CONFIG, Adapter
from loratool.core.architecture import Architecture
from loratool.core.errors import LoratoolError, UsageError
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.registry import architectures, layouts
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import check_output
from loratool.ops import recipe
from loratool.ops.extract import Rest, Wish, check_full, check_wish, extract, finite_or_raise, rest_of
from loratool.ops.extract_report import ExtractReport, extract_report
from loratool.ops.made import Made, Progress, make, save_made, told
from loratool.ops.ranks import check_limits
from loratool.ops.recipe import file_name
from loratool.ops.sides import Places, Sides, open_sides

PROBED = 1e-6
"""How far off measuring a product in float32 may be by itself, where the input is wide."""


def extract_file(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    wish: Wish,
    *,
    to: str | None = None,
    full: bool = False,
    architecture: Architecture | str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> ExtractReport:
    """Writes what training changed, TUNED - BASE, as an adapter in the layout `to`; `output` None writes nothing.

    Either checkpoint is a file, shards, or a folder with one sub-folder per component, in any spelling of their model.
    See `extract` for the mathematics, `default_layout` for `to` None and `save_made` for what is checked. `full` adds
    the norms, biases and embeddings that differ. Raises UsageError for a wish that makes no sense, NotRepresentable for
    a layout that cannot hold `full`, FormatError for checkpoints of two models, LoratoolError where nothing differs.
    """
    started = time.perf_counter()
    check_limits(wish.limits)
    check_wish(wish)
    model = _named(architecture) if isinstance(architecture, str) else architecture
    before, after = os.fspath(base), os.fspath(tuned)
    sides = open_sides(before, after, model)
    layout = layouts()[to or default_layout(sides, full)]
    if not layout.writable:
        raise UsageError(f"the layout {layout.id} is only read", hint="write kohya, diffusers, comfyui or peft")
    if full:
        check_full(layout.id)
    if output is not None:
        check_output(output, [before, after], layout.folder, overwrite)
    try:
        hashes = _hashing([before, after] if output is not None else [])
        places = sides.places(layout)
        rest = rest_of(sides, places.both, layout, wish.dtype)
        work = _Work(sides, layout, wish, _kept(rest) if full else {}, recipe.architecture_id(architecture), full)
        done = extract(
            sides,
            places.both,
            wish,
            written=lambda modules: work.made(modules, hashes()).size_bytes,
            measuring=told(progress, "measuring"),
            decomposing=told(progress, "decomposing"),
        )
        finite_or_raise(done, wish.dtype)
        modules = [one.module for one in done.found]
        if not modules and not work.extras:
            raise _nothing(places, len(done.skipped), wish, rest)
        made = work.made(modules, hashes())
        held = None
        if output is not None:
            held = save_made(
                made,
                [[(module, 1.0)] for module in modules],
                [PROBED] * len(modules),
                output,
                images=[one.image for one in done.found],
                overwrite=overwrite,
                verify=verify,
                progress=progress,
            )
    except LoratoolError as error:
        raise error.with_file(after) from error.__cause__
    return replace(
        extract_report(sides, layout, wish, places, rest, full, done),
        output=None if output is None else os.fspath(output),
        size_after=made.size_bytes,
        held=held,
        seconds=time.perf_counter() - started,
    )


def default_layout(sides: Sides, full: bool = False) -> str:
    """kohya, which most programs read; peft for a folder of a model without a table: a language model, most likely.

    With `full` comfyui: it has a place for every bias.
    """
    if full and "comfyui" in sides.architecture.writes:
        return "comfyui"
    folder = sides.base_files.folder and sides.architecture.id == "generic"
    return "peft" if folder or "kohya" not in sides.architecture.writes else "kohya"


def _named(architecture: str) -> Architecture:
    known = {name: model for name, model in architectures().items() if not model.open}
    if architecture not in known:
        raise UsageError(f"no model with a table is called {architecture!r}", hint=f"known: {', '.join(sorted(known))}")
    return known[architecture]


@dataclass(frozen=True, eq=False)
class _Work:
    """What is the same of every file that this extraction may become."""

    sides: Sides
    layout: Layout
    wish: Wish
    extras: Mapping[str, LazyTensor]
    architecture: str | None
    full: bool

    def made(self, modules: Sequence[Module], hashes: Sequence[str]) -> Made:
        """The file with these modules."""
        name = file_name(self.sides.base.path)
        config = {"base_model_name_or_path": name, "fan_in_fan_out": bool(self.sides.base.transposed)}
        adapter = Adapter(
            modules=tuple(modules),
            architecture=self.sides.architecture,
            layout=self.layout.id,
            metadata={"ss_sd_model_name": name} if self.layout.id == "kohya" else {},
            extras=self.extras,
            side_files={CONFIG: json.dumps(config)} if self.layout.id == "peft" else {},
        )
        return make(adapter, self.layout.id, self._recipe(hashes))

    def _recipe(self, hashes: Sequence[str]) -> dict[str, Any]:
        names = [file_name(side.path) for side in (self.sides.base, self.sides.tuned)]
        # A dry run hashes nothing: the same length will do.
        digests = hashes or ["0" * 64] * len(names)
        inputs = [{"name": name, "sha256": digest} for name, digest in zip(names, digests, strict=True)]
        wish = self.wish
        settings = {
            "rule": wish.rule.title,
            **wish.limits.settings(),
            "to": self.layout.id,
            "dtype": wish.dtype,
            "min_norm": wish.min_norm or None,
            "exact": wish.exact or None,
            "clamp": wish.clamp,
            "full": self.full or None,
            "architecture": self.architecture,
            "device": recipe.device_kind(wish.device),
        }
        return recipe.recipe("extract", inputs, settings)


def _hashing(paths: Sequence[str]) -> Callable[[], list[str]]:
    """Begins to hash checkpoints in the background, each in a thread of its own; the function waits for the hashes."""
    if not paths:
        return list
    pool = ThreadPoolExecutor(len(paths), "loratool-sha256")
    futures = [pool.submit(recipe.checkpoint_sha256, path) for path in paths]
    pool.shutdown(wait=False)
    return lambda: [future.result() for future in futures]


def _kept(rest: Sequence[Rest]) -> dict[str, LazyTensor]:
    return {one.key: one.tensor for one in rest if one.key is not None and one.tensor is not None}


def _nothing(places: Places, skipped: int, wish: Wish, rest: Sequence[Rest]) -> LoratoolError:
    if not places.both:
        return LoratoolError("has no weight in common with the base", hint="name two checkpoints of one model")
    limit = f" by more than {wish.min_norm:g} of its norm" if wish.min_norm else ""
    way = None
    if any(one.tensor is not None for one in rest):
        way = "norms, biases or embeddings do: --full keeps those"
    return LoratoolError(f"none of its {skipped} linears and convolutions differs from the base{limit}", hint=way)
