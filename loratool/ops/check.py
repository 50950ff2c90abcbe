"""check: how a program loads a file, and which command makes it load fully. Reads the header, never torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from loratool.core.adapter import Adapter
from loratool.core.errors import LoratoolError, NotRepresentable, UnknownModel, UsageError
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.program import Program
from loratool.core.registry import families, layouts, programs
from loratool.core.tensor import LazyTensor, Source
from loratool.ops.approximate import is_rewritten
from loratool.ops.conformance import CHANGED, READ, REFUSED, Conformance, conform
from loratool.ops.open import open_adapter
from loratool.ops.spell import spell


@dataclass(frozen=True)
class Remedy:
    """What makes a file load fully: a command, or words where it takes something else.

    `exact`: every update stays as it is. `leaves_out` are tensors that the command leaves out.
    """

    command: str
    advice: str = ""
    exact: bool = True
    leaves_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """How a program loads a file, and the way out; `remedy` is None where nothing has to or can be done."""

    conformance: Conformance
    remedy: Remedy | None


@dataclass(frozen=True)
class Candidate:
    """A layout that an adapter can be converted to for a program, and how the program would load the result.

    `folded`: the scales have to be multiplied into the factors, `approximated`: modules to be rewritten as LoRA.
    `obstacle` says why the layout cannot be written; then there
    is no `conformance`.
    """

    layout: str
    conformance: Conformance | None
    folded: bool = False
    approximated: bool = False
    obstacle: str = ""

    @property
    def fully(self) -> bool:
        """Whether the program loads the result fully."""
        return self.conformance is not None and self.conformance.fully


def check_file(path: str | os.PathLike[str], program: str, architecture: str | None = None) -> Check:
    """How the program of that id loads the adapter at `path`. Raises LoratoolError where it is no adapter."""
    adapter = open_adapter(path, architecture=architecture)
    return check(adapter, programs()[program_named(program)], named=architecture is not None)


def check(adapter: Adapter, program: Program, *, named: bool = False) -> Check:
    """How `program` loads an adapter as it was read, and what makes it load fully.

    `named`: the model was named by the user, so that commands have to name it again.
    Raises LoratoolError where all its modules are of kinds that have no plug-in, UnknownModel where nothing can be said
    because names are flattened and belong to no known model.
    """
    if adapter.architecture.id == "unknown":
        raise UnknownModel(
            "the model is unknown and its names are flattened, so that nothing can be said of programs",
            hint="; ".join(adapter.notes) or "name the model with --architecture",
        ).with_file(adapter.path)
    if adapter.unread_families and not adapter.modules:
        kinds = ", ".join(f"{count} {family}" for family, count in sorted(adapter.unread_families.items()))
        raise LoratoolError(f"holds no module that can be judged yet, only {kinds}", file=adapter.path)
    found = conform(adapter, program)
    return Check(found, None if found.fully else _remedy(found, named))


def program_named(name: str) -> str:
    """The id of a program. Raises UsageError with the nearest and the known ones."""
    known: Collection[str] = programs()
    if name in known:
        return name
    near = get_close_matches(name.lower(), known, 1, 0.5)
    nearest = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"no program is called {name!r}", hint=f"{nearest}known: {', '.join(sorted(known))}")


def _remedy(found: Conformance, named: bool) -> Remedy | None:
    adapter, program = found.adapter, found.program
    model = ["--architecture", adapter.architecture.id] if named else []
    extras = tuple(adapter.extras)
    some = _applied(found)
    for candidate in candidates(adapter, program):
        some = some or (candidate.conformance is not None and _applied(candidate.conformance))
        if not candidate.fully:
            continue
        words = ["loratool", "convert", adapter.path or "FILE", "--for", program.id, *model]
        words += ["--approximate", "lora", "--energy", "0.999"] if candidate.approximated else []
        words += ["--base", "BASE"] if candidate.approximated and not _additive(adapter) else []
        words += ["--drop-extras"] if extras else []
        command = shlex.join(words) + " -o OUT"
        return Remedy(command, exact=not candidate.approximated, leaves_out=extras)
    return _setting(found) or (_bake(found) if some else None)


def _additive(adapter: Adapter) -> bool:
    """Whether what every module that would be rewritten adds is told by the file alone."""
    return all(module.family.additive or len(module.shape) < 2 for module in adapter.modules)


def _applied(found: Conformance) -> bool:
    """Whether the program knows what to do with any module: else it knows nothing of the model, either."""
    return bool(found.counts[READ] + found.counts[CHANGED])


def _setting(found: Conformance) -> Remedy | None:
    """Where nothing but high ranks is in the way: the program's setting."""
    limit = found.program.rank
    others = [fate for fate in found.fates if len(fate.reasons) != 1 and fate.reasons]
    high = max((module.rank for module in found.adapter.modules), default=0)
    if limit is None or high <= limit.default or high > limit.choices[-1] or others or found.key_fates:
        return None
    room = next(choice for choice in limit.choices if choice >= high)
    if any(fate.outcome != REFUSED for fate in found.fates if fate.reasons):
        return None
    return Remedy("", f"start {found.program.title} with {limit.setting} {room}")


def _bake(found: Conformance) -> Remedy | None:
    adapter = found.adapter
    if not (adapter.architecture.checkpoints or adapter.architecture.open) or adapter.unread_families:
        return None
    command = f"{shlex.join(['loratool', 'bake', 'BASE', adapter.path or 'FILE'])} -o OUT"
    return Remedy(command, "no conversion does; this puts the update into a checkpoint, which every program loads")


def candidates(adapter: Adapter, program: Program) -> Iterator[Candidate]:
    """What `adapter` can become for `program`.

    Each layout as it is, then with scales in the factors (alpha = rank), then with modules rewritten as LoRA.

    Extras are left out. Nothing is read or computed: values do not matter to a program's rules.
    """
    if not adapter.modules:
        return
    known = adapter.architecture.writes
    names = [n for n in program.layouts_for(adapter.architecture.id) if n in layouts() and n in known]
    usable = [layouts()[name] for name in names if layouts()[name].writable]
    empty = replace(adapter, modules=tuple(_valueless(m) for m in adapter.modules), extras={}, unread_families={})
    yield from (_candidate(empty, program, layout) for layout in usable)
    if any(module.scale != 1.0 for module in empty.modules):
        plain = replace(empty, modules=tuple(replace(module, alpha=None) for module in empty.modules))
        yield from (_candidate(plain, program, layout, folded=True) for layout in usable)
    for layout in usable:
        modules = tuple(_pair(m) if is_rewritten(m, layout.obstacle) else m for m in empty.modules)
        if any(one is not other for one, other in zip(modules, empty.modules, strict=True)):
            yield _candidate(replace(empty, modules=modules), program, layout, approximated=True)


def _candidate(
    adapter: Adapter, program: Program, layout: Layout, *, folded: bool = False, approximated: bool = False
) -> Candidate:
    try:
        spelled = spell(adapter, layout.id)
        again = layout.read(spelled.bundle, adapter.architecture)
    except LoratoolError as error:
        what = error.message if isinstance(error, NotRepresentable) else str(error)
        return Candidate(layout.id, None, folded, approximated, what)
    return Candidate(layout.id, conform(again, program), folded, approximated)


class _Any:
    """A source whose bytes nobody has chosen: none of its values is zero."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def chunks(self, size: int = 1 << 20) -> Iterator[memoryview]:
        """The bytes in pieces."""
        for start in range(0, self.nbytes, size):
            yield memoryview(b"\x3c" * min(size, self.nbytes - start))

    def read(self) -> memoryview:
        """All bytes."""
        return memoryview(b"\x3c" * self.nbytes)

    def slice(self, start: int, stop: int) -> Source:
        """Some of them."""
        return _Any(stop - start)


def _valueless(module: Module) -> Module:
    factors = {role: _like(factor) for role, factor in module.factors.items()}
    return replace(module, factors=factors, magnitude=None if module.magnitude is None else _like(module.magnitude))


def _like(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, _Any(tensor.nbytes))


def _pair(module: Module) -> Module:
    """A LoRA of rank 1 in a module's place."""
    out, columns, *kernel = module.shape
    standard: Sequence[int] = module.targets[0].shape
    if not kernel and len(standard) > 2:  # a LoKr that hides the kernel
        kernel = list(standard[2:])
        for size in kernel:
            columns //= size
    ones = [1] * len(kernel)
    width = module.factors[next(iter(module.factors))]
    shapes = {"up": (out, 1, *ones), "down": (1, columns, *kernel)}
    factors = {role: _filled(shape, width.dtype) for role, shape in shapes.items()}
    return replace(module, family=families()["lora"], factors=factors, alpha=1.0)


def _filled(shape: tuple[int, ...], dtype: str) -> LazyTensor:
    size = len(LazyTensor.scalar(1.0, dtype).read())
    count = 1
    for length in shape:
        count *= length
    return LazyTensor(shape, dtype, _Any(count * size))
