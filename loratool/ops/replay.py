"""Replay: a merged or resized file made again from the recipe in its header, and compared with what is there."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.core.adapter import CONFIG, Bundle
from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.core.registry import methods
from loratool.core.tensor import same_bytes
from loratool.files.bundle import MODEL, check_output, is_component_folder, read_bundle
from loratool.ops import recipe
from loratool.ops.compare import compare
from loratool.ops.convert import dtype_code
from loratool.ops.devices import device_named
from loratool.ops.inputs import Asked
from loratool.ops.made import Progress
from loratool.ops.merge_files import merge_files
from loratool.ops.open import layout_named, open_adapter
from loratool.ops.per_block import from_mapping
from loratool.ops.ranks import GLOBAL, LOCAL, Limits, Rule, parse_rule
from loratool.ops.resize_file import resize_file

MOST_INPUTS = 1000
MOST_PATTERNS = 5000
LONGEST_TEXT = 1000
"""More than this is no recipe of ours, and would only keep us busy."""

_BOTH = {"rule": str, "min_rank": int, "max_rank": int, "conv_rank": int, "to": str, "dtype": str}
_BOTH |= {"base": dict, "architecture": str, "drop_extras": bool, "device": str}
_SETTINGS: Mapping[str, Mapping[str, type]] = {
    "merge": _BOTH | {"method": str, "options": dict, "approximate": bool, "metadata": str, "title": str},
    "resize": _BOTH | {"per_block": dict},
}
"""What a recipe of each command may say besides command, version and inputs."""


@dataclass(frozen=True)
class Needed:
    """A file as a recipe names it, and where it was found (None: not yet)."""

    name: str
    sha256: str
    path: str | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe whose kinds were checked. `weights` and `blocks` are those of the inputs; a resize has none."""

    command: str
    version: str
    inputs: tuple[Needed, ...]
    weights: tuple[float, ...]
    blocks: tuple[Mapping[str, Any] | None, ...]
    base: Needed | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """How a remade file differs. `result` is "identical" (every byte), "header" (the same tensors, another header or
    side file) or "tensors"; `entries` are what of header and side files differs, `tensors` how many tensors do.

    `error` is the largest relative difference (Frobenius) of an update, that of `worst_module`; None if tensors are the
    same, NaN if it cannot be told.
    """

    result: str
    entries: tuple[str, ...] = ()
    tensors: int = 0
    error: float | None = None
    worst_module: str | None = None


@dataclass(frozen=True)
class ReplayReport:
    """What `loratool replay` did. `version` is that of the loratool that wrote the recipe; `output` None: compared
    only. `seconds` of wall time."""

    source: str
    output: str | None
    command: str
    version: str
    inputs: tuple[Needed, ...]
    base: Needed | None
    settings: Mapping[str, Any]
    comparison: Comparison
    device: str
    notes: tuple[str, ...]
    seconds: float


def replay_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    folders: Sequence[str | os.PathLike[str]] = (),
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReplayReport:
    """Makes the file at `path` again, at `output` or for the comparison alone, from the recipe in its header.

    Inputs are looked for in its folder, in `folders` and in the working directory: by name, and where that is not
    there or another file, by sha256. `device` None takes the kind of device that the recipe names. Raises FormatError
    for a recipe that cannot be followed, LoratoolError for inputs that are not there or have changed.
    """
    started = time.perf_counter()
    place = _whole(Path(path))
    bundle = read_bundle(place)
    try:
        plan = plan_of(recipe.decode(bundle.metadata))
        if output is not None:
            check_output(output, [str(place)], place.is_dir(), overwrite)
        search = _Search.of([place.parent, *map(Path, folders)])
        inputs = search.all(plan.inputs, recipe.sha256)
        base = search.all((plan.base,), recipe.checkpoint_sha256)[0] if plan.base else None
        where, notes = _device(plan, device)
        with tempfile.TemporaryDirectory(prefix="loratool-replay-") as temporary:
            target = os.fspath(output) if output is not None else str(Path(temporary) / "again.safetensors")
            made = _run(plan, inputs, base, target, where, overwrite, output is not None, progress)
            comparison = compared(place, Path(made), plan.settings.get("architecture"))
    except UsageError as error:
        if error.file is not None and error.file in map(str, folders):
            raise
        message = f"its recipe cannot be followed: {error.message}"
        raise FormatError(message, file=str(path), key=error.key, hint=error.hint) from error
    except LoratoolError as error:
        raise error.with_file(str(path)) from error.__cause__
    return ReplayReport(
        source=str(path),
        output=made if output is not None else None,
        command=plan.command,
        version=plan.version,
        inputs=inputs,
        base=base,
        settings=plan.settings,
        comparison=comparison,
        device=where,
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _whole(place: Path) -> Path:
    """The PEFT folder, where its model was named."""
    return place.parent if place.name == MODEL and (place.parent / CONFIG).is_file() else place


def _device(plan: Plan, device: str | None) -> tuple[str, tuple[str, ...]]:
    """The device to compute on, and a note where it is not of the kind that the recipe names."""
    kind = plan.settings.get("device", "cpu")
    try:
        where = device if device is not None else device_named(kind)
    except UsageError:
        where = "cpu"
    if (recipe.device_kind(where) or "cpu") == kind:
        return where, ()
    return where, (f"made on {kind}, made again on {where}: last bits may differ",)


# -- the recipe -------------------------------------------------------------------------------------------------------


def plan_of(made: Mapping[str, Any]) -> Plan:
    """A decoded recipe with every kind and name checked. It comes from a file: nothing in it is believed.

    Raises FormatError for what loratool would not have written.
    """
    command = made.get("command")
    if not isinstance(command, str) or command not in _SETTINGS:
        raise FormatError(f"its recipe is for {_short(command)}", hint=f"known: {', '.join(sorted(_SETTINGS))}")
    kinds = _SETTINGS[command]
    settings = {key: value for key, value in made.items() if key not in ("command", "version", "inputs")}
    for key, value in settings.items():
        if key not in kinds:
            raise FormatError(f"its recipe has a setting {_short(key)}", hint="a newer loratool may know it")
        if type(value) is not kinds[key] or (isinstance(value, str) and len(value) > LONGEST_TEXT):
            raise FormatError(f"its recipe says {_short(value)} for {key}")
    inputs = made["inputs"]
    if len(inputs) > MOST_INPUTS or (command == "resize" and len(inputs) != 1):
        raise FormatError(f"its recipe names {len(inputs)} inputs")
    _check_patterns(settings.get("per_block", {}))
    return Plan(
        command=command,
        version=_text(made.get("version"), "version"),
        inputs=tuple(_needed(one) for one in inputs),
        weights=tuple(_weight(one.get("weight", 1.0)) for one in inputs),
        blocks=tuple(_blocks(one.get("blocks")) for one in inputs),
        base=_needed(settings["base"]) if "base" in settings else None,
        settings=settings,
    )


def _needed(one: Mapping[str, Any]) -> Needed:
    """Names are those of files in a folder, never paths: a recipe does not decide where we read."""
    name, digest = _text(one.get("name"), "name"), _text(one.get("sha256"), "sha256")
    if name in ("", ".", "..") or any(char in name for char in "/\\\0") or os.path.splitdrive(name)[0]:
        raise FormatError(f"its recipe names {_short(name)} as an input, which is no file name")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise FormatError(f"its recipe says {_short(digest)} for the sha256 of {_short(name)}")
    return Needed(name, digest)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise FormatError(f"its recipe says {_short(value)} for {what}")
    return value


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e30 < value < 1e30:
        raise FormatError(f"its recipe says {_short(value)} for a weight")
    return value  # as it is: what was an integer is written as one again


def _blocks(value: object) -> Mapping[str, Any] | None:
    if value is None:
        return None
    entries = value.get("entries") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(entries, list):
        raise FormatError(f"its recipe says {_short(value)} for blocks")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in entries):
        raise FormatError("its recipe has blocks that are no [pattern, weight] pairs")
    _check_patterns([pattern for pattern, _ in entries])
    for weight in (value.get("rest"), *(weight for _, weight in entries)):
        _weight(weight)
    return value


def _check_patterns(patterns: Sequence[object] | Mapping[str, object]) -> None:
    if len(patterns) > MOST_PATTERNS:
        raise FormatError(f"its recipe has {len(patterns)} patterns of blocks, at most {MOST_PATTERNS} are followed")
    for pattern in patterns:
        _text(pattern, "a pattern")


def _short(value: object) -> str:
    # A slice first: the repr of a huge list would be huge itself.
    text = repr(value[:60] if isinstance(value, (str, list)) else value)
    return text if len(text) <= 80 else text[:80] + "..."


# -- inputs -----------------------------------------------------------------------------------------------------------

Hash = Callable[[Path], str]


@dataclass(frozen=True)
class _Search:
    """The folders in which inputs are looked for, and the hashes of what was looked at."""

    folders: tuple[Path, ...]
    known: dict[tuple[str, Path], str | None]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> _Search:
        """These folders and the working directory, each once. Raises UsageError for one that is not there."""
        for folder in folders[1:]:
            if not folder.is_dir():
                raise UsageError("there is no such folder", file=str(folder))
        try:
            places = [*folders, Path.cwd()]
        except FileNotFoundError:  # it was removed
            places = [*folders]
        return cls(tuple({os.path.realpath(place): place for place in reversed(places)}.values())[::-1], {})

    def all(self, needed: Sequence[Needed], digest: Hash) -> tuple[Needed, ...]:
        """The files that are needed, with their paths. Raises LoratoolError for those that are not there."""
        found, missing = [], []
        for one in needed:
            place, other = self._named(one, digest)
            place = place or self._any(one, digest)
            found.append(Needed(one.name, one.sha256, str(place)))
            if place is None:
                changed = f"{other} is another file now" if other else "is not there"
                missing.append(f"{one.name} {f'({changed})' if other else changed}")
        if missing:
            looked = ", ".join(str(folder) for folder in self.folders)
            hint = f"looked by name and by sha256 in {looked}; name another folder with --from"
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise LoratoolError(f"cannot be made again without its inputs: {'; '.join(missing[:3])}{more}", hint=hint)
        return tuple(found)

    def _named(self, one: Needed, digest: Hash) -> tuple[Path | None, Path | None]:
        """The file of that name and hash; and one of that name with another hash."""
        other = None
        for folder in self.folders:
            place = folder / one.name
            if place.is_file() or place.is_dir():
                if self._hash(place, digest) == one.sha256:
                    return place, None
                other = other or place
        return None, other

    def _any(self, one: Needed, digest: Hash) -> Path | None:
        """A file or folder with that hash under any name, small ones first."""
        places = {place: None for folder in self.folders for place in _adapters(folder)}
        return next((p for p in sorted(places, key=_size) if self._hash(p, digest) == one.sha256), None)

    def _hash(self, place: Path, digest: Hash) -> str | None:
        key = (digest.__name__, place)
        if key not in self.known:
            try:
                self.known[key] = digest(place)
            except OSError:
                self.known[key] = None
        return self.known[key]


def _adapters(folder: Path) -> Iterator[Path]:
    """Files of tensors and folders that hold an adapter or a checkpoint."""
    try:
        for place in folder.iterdir():
            if place.is_file():
                if place.suffix == ".safetensors":
                    yield place
            elif (place / CONFIG).is_file() or (place.is_dir() and _holds(place)):
                yield place
    except OSError:  # what cannot be listed cannot be found
        return


def _holds(place: Path) -> bool:
    files = list(place.glob("*.safetensors"))
    return len(files) == 1 or any(is_component_folder(sub) for sub in place.iterdir())


def _size(place: Path) -> int:
    return place.stat().st_size if place.is_file() else 0


# -- doing it again ---------------------------------------------------------------------------------------------------


def _run(
    plan: Plan,
    inputs: Sequence[Needed],
    base: Needed | None,
    target: str,
    device: str,
    overwrite: bool,
    verify: bool,
    progress: Progress | None,
) -> str:
    """Does what the recipe says and gives the path of what it wrote."""
    settings = plan.settings
    shared: dict[str, Any] = {
        "to": layout_named(settings["to"]) if "to" in settings else None,
        "dtype": dtype_code(settings["dtype"]) if "dtype" in settings else None,
        "limits": Limits(settings.get("min_rank", 1), settings.get("max_rank"), settings.get("conv_rank")),
        "base": base.path if base else None,
        "base_name": base.name if base else None,
        "architecture": settings.get("architecture"),
        "drop_extras": settings.get("drop_extras", False),
        "device": device,
        "overwrite": overwrite,
        "verify": verify,
        "progress": progress,
    }
    rule = _rule(settings["rule"]) if "rule" in settings else None
    if plan.command == "merge":
        return _merge(plan, inputs, rule, target, shared)
    if rule is None:
        raise FormatError("its recipe names no rule")
    return _resize(plan, inputs[0], rule, target, shared)


def _merge(plan: Plan, inputs: Sequence[Needed], rule: Rule | None, target: str, shared: Mapping[str, Any]) -> str:
    settings = plan.settings
    name = settings.get("method", "")
    if name not in methods():
        raise FormatError(f"its recipe names the method {_short(name)}", hint="a newer loratool may know it")
    asked = [
        Asked(one.path or "", weight, blocks, one.name)
        for one, weight, blocks in zip(inputs, plan.weights, plan.blocks, strict=True)
    ]
    done = merge_files(
        asked,
        target,
        methods()[name],
        settings.get("options", {}),
        rule=rule,
        approximate=settings.get("approximate", False),
        metadata=settings.get("metadata", "first"),
        title=settings.get("title"),
        **shared,
    )
    return done.output


def _resize(plan: Plan, source: Needed, rule: Rule, target: str, shared: Mapping[str, Any]) -> str:
    path, per_block = source.path or "", plan.settings.get("per_block")
    own = None
    if per_block is not None:
        adapter = open_adapter(path, architecture=shared["architecture"])
        own = from_mapping(per_block, adapter.architecture, adapter.modules)
    done = resize_file(path, [rule], target, own=own, per_block=per_block, name=source.name, **shared)
    return done.outcomes[0].output or target


def _rule(title: str) -> Rule:
    """The rule of `Rule.title`."""
    kind, _, text = title.partition(" ")
    if kind not in (*LOCAL, *GLOBAL):
        raise FormatError(f"its recipe names the rule {_short(title)}", hint="a newer loratool may know it")
    return parse_rule(kind, text)


# -- the comparison ---------------------------------------------------------------------------------------------------


def compared(old: Path, new: Path, architecture: str | None = None) -> Comparison:
    """How the adapter at `new` differs from that at `old`: files or folders."""
    if old.is_dir() == new.is_dir() and recipe.sha256(old) == recipe.sha256(new):
        return Comparison("identical")
    before, after = read_bundle(old), read_bundle(new)
    entries = tuple(_differing(before, after))
    keys = before.tensors.keys() | after.tensors.keys()
    different = [
        key
        for key in keys
        if key not in before.tensors
        or key not in after.tensors
        or not same_bytes(before.tensors[key], after.tensors[key])
    ]
    if not different:
        return Comparison("header", entries)
    error, worst = _difference(old, new, architecture)
    return Comparison("tensors", entries, len(different), error, worst)


def _differing(before: Bundle, after: Bundle) -> Iterator[str]:
    """Names of the header entries and side files that differ; of a recipe also what in it."""
    for ours, theirs in ((before.metadata, after.metadata), (before.side_files, after.side_files)):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) == theirs.get(key):
                continue
            if key == recipe.ENTRY and key in ours and key in theirs:
                told, again = recipe.decode(ours), recipe.decode(theirs)
                parts = [part for part in {**told, **again} if told.get(part) != again.get(part)]
                yield f"{key} ({', '.join(parts)})" if parts else f"{key} (its form)"
            else:
                yield key


def _difference(old: Path, new: Path, architecture: str | None) -> tuple[float, str | None]:
    """The largest relative difference of an update, and where."""
    try:
        ours, theirs = (open_adapter(place, architecture=architecture) for place in (old, new))
        found = list(compare(ours.modules, theirs.modules))
    except LoratoolError:  # another layout or model altogether
        return math.nan, None
    worst = max(found, key=lambda one: math.inf if math.isnan(one.error) else one.error, default=None)
    return (worst.error, worst.title) if worst is not None and worst.error else (0.0, None)
