"""The adapter: its modules, their shapes, alphas and dtypes, and whether it is one at all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from loratool.core.architecture import Architecture
from loratool.core.errors import few
from loratool.core.finding import ERROR, NOTE, WARNING, Check, Code, Finding, codes
from loratool.core.identify import what_it_is
from loratool.core.layout import ALPHA, Group, fits
from loratool.core.module import Module
from loratool.core.registry import architectures, families, layouts
from loratool.files.subjects import Content, byte_of

_HUGE, _TINY = 100.0, 1e-4
"""Scales (alpha / rank) beyond which nobody trains."""

_BROKEN = "the file is damaged or was written by a broken tool: use an earlier one"
_ALPHA = "the writer is broken: use an earlier file, or set alpha to the rank"

_CODES = codes(
    Code("no-tensors", ERROR, "The file holds no tensor."),
    Code("is-checkpoint", ERROR, "The file is a checkpoint, not a LoRA."),
    Code("is-vae", ERROR, "The file is a VAE, not a LoRA."),
    Code("is-embedding", ERROR, "The file is a textual inversion, not a LoRA."),
    Code("too-many-tensors", WARNING, "More than 100,000 tensors: only the container and the numbers were looked at."),
    Code("no-adapter", ERROR, "No key is one of an adapter.", "it is no LoRA, or of a kind that is not known yet"),
    Code("cannot-be-read", ERROR, "The modules are whole, and still the adapter cannot be read."),
    Code("missing-half", ERROR, "A module lacks a factor.", _BROKEN),
    Code("no-factors", ERROR, "An alpha or a DoRA magnitude stands without factors.", _BROKEN),
    Code("rank-mismatch", ERROR, "The ranks of a module's factors differ.", _BROKEN),
    Code("rank-zero", ERROR, "A module has the rank 0, or another size of 0.", _BROKEN),
    Code("transposed", ERROR, "A factor is transposed, or up and down are swapped.", "transpose it back"),
    Code("broken-module", ERROR, "The factors of a module do not fit one another.", _BROKEN),
    Code("two-families", ERROR, "One module is given as two kinds of adapter.", _BROKEN),
    Code("spelled-twice", ERROR, "One module is spelled twice: programs take different ones.", "remove one of them"),
    Code("bad-magnitude", ERROR, "A DoRA magnitude has not one value per row or column.", _BROKEN),
    Code("alpha-no-number", ERROR, "An alpha is not one real number.", _ALPHA),
    Code("alpha-not-finite", ERROR, "An alpha is NaN or infinite.", _ALPHA),
    Code("alpha-zero", WARNING, "An alpha is 0: the module does nothing.", _ALPHA),
    Code("alpha-negative", WARNING, "An alpha is negative: the update is subtracted.", _ALPHA),
    Code("alpha-absurd", WARNING, "alpha / rank is above 100 or below 0.0001.", _ALPHA),
    Code("alpha-missing", WARNING, "Some modules have an alpha and others do not: those are taken at full strength."),
    Code(
        "mixed-dtypes",
        NOTE,
        "Factors have different dtypes (a warning within one module).",
        "convert --dtype makes them one",
    ),
    Code("mixed-layouts", WARNING, "Some keys are in another layout than the others: most programs drop them."),
    Code("unknown-module", WARNING, "A module has a name that the model does not have: programs skip it."),
    Code("unread-key", WARNING, "A key has an ending that no program writes: it is skipped."),
    Code("unread-family", NOTE, "A kind of adapter that is not read yet: its modules were only looked at in part."),
    Code("unknown-model", NOTE, "No known model has these names, so that they were not checked."),
    Code("ambiguous-model", NOTE, "Several models have these names and shapes."),
    Code("other-shape", ERROR, "A module has another size than the model's weight, while others have the right one."),
    Code("other-width", WARNING, "No module has the model's size: another model's shapes under its names?"),
    Code("metadata-mismatch", WARNING, "The metadata say that the file is for another model than its keys do."),
    Code("base-unusable", ERROR, "The base that was named cannot be used.", "name a checkpoint of the LoRA's model"),
    Code("not-in-base", ERROR, "A module updates a weight that the base does not have.", "name another base"),
    Code("base-shape", ERROR, "A module updates a weight of another shape in the base.", "name another base"),
)
_HALVES = {
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b"),
    "glora": ("a1", "a2", "b1", "b2"),
}
"""What a module has of families that may have no plug-in."""

_REFUSED = {
    "spelled twice": "spelled-twice",
    "magnitude": "bad-magnitude",
    "alpha has shape": "alpha-no-number",
    "a real number": "alpha-no-number",
}
"""What reading says of a module, and the code for it."""


def _run(content: Content) -> Iterator[Finding]:
    if content.part:
        return
    if content.many:
        message = f"{len(content.bundle.tensors):,} tensors: the modules were not looked at"
        yield CHECK.finding("too-many-tensors", message, content.path)
        return
    other = what_it_is(content.bundle)
    if other is not None:
        kinds = {"empty": "no-tensors", "a VAE": "is-vae", "a textual": "is-embedding"}
        code = next((code for begin, code in kinds.items() if other.what.startswith(begin)), "is-checkpoint")
        yield CHECK.finding(code, f"is {other.what}", content.path, hint=other.hint)
        return
    reading = content.reading
    for key, twin in reading.twice:
        message = f"says the same as {twin!r}: one module is spelled twice"
        yield CHECK.finding("spelled-twice", message, content.path, key=key, byte=byte_of(content, key))
    if reading.detection is None:
        first = next(iter(content.bundle.tensors), "none")
        message = str(reading.error) if reading.error else f"holds no key of an adapter (first key: {first!r})"
        yield CHECK.finding("no-adapter", message, content.path)
        return
    yield from _groups(content)
    yield from _names(content)
    for stem, refused in reading.refused.items():
        key = refused.key or stem
        code = next((code for word, code in _REFUSED.items() if word in refused.message), "cannot-be-read")
        yield CHECK.finding(code, refused.message, content.path, key=key, byte=byte_of(content, key))
    if reading.error is not None:
        hint = reading.error.hint or ""
        yield CHECK.finding("cannot-be-read", reading.error.message, content.path, key=reading.error.key, hint=hint)
    if reading.adapter is not None:
        yield from _alphas(content, reading.adapter.modules)
        yield from _dtypes(content, reading.adapter.modules)
        yield from _sizes(content, reading.adapter.modules)
        yield from _claims(content, reading.adapter.architecture)
    yield from _base(content)


# ---------------------------------------------------------------- modules


def _groups(content: Content) -> Iterator[Finding]:
    reading = content.reading
    unread = Counter[str]()
    for stem, group in reading.groups.items():
        for family in group.by_family:
            unread[family] += family not in families()
        code, message = _problem(content, group, reading.problems.get(stem))
        if code:
            yield CHECK.finding(code, message, content.path, key=stem, byte=byte_of(content, group.keys[0]))
    for family, count in unread.items():
        if count:
            yield CHECK.finding("unread-family", f"{count} modules of the kind {family}", content.path)


def _problem(content: Content, group: Group, told: str | None) -> tuple[str, str]:
    """The code and the sentence of what is wrong with one module; nothing where it is whole."""
    if not group.by_family:
        return "no-factors", told or ""
    if len(group.by_family) > 1:
        return "two-families", told or ""
    ((family, roles),) = group.by_family.items()
    if told is not None and told.startswith("alpha"):
        return "alpha-no-number", told
    shapes = {role: content.bundle.tensors[key].shape for role, key in roles.items()}
    if family not in families():
        missing = [role for role in _HALVES.get(family, ()) if role not in shapes]
        if missing:
            return "missing-half", f"has no {', '.join(missing)}: part of the module is missing"
        return _unread_ranks(family, shapes)
    if told is None:
        return "", ""
    if any(0 in shape for shape in shapes.values()):
        return "rank-zero", f"a factor has a size of 0: {_listed(shapes)}"
    if "is missing" in told:
        return "missing-half", told
    if family == "lora" and _turned(shapes):
        return "transposed", f"{told}; transposed or swapped, they would fit"
    if re.search(r"\branks?\b.* differ|ranks differ", told):
        return "rank-mismatch", told
    return "broken-module", told


def _unread_ranks(family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Ranks of a LoHa's pairs, which must agree, where no plug-in looks."""
    if any(0 in shape for shape in shapes.values()):
        return "rank-zero", f"a factor has a size of 0: {_listed(shapes)}"
    if family == "loha" and "t1" not in shapes:
        for side in ("w1", "w2"):
            a, b = shapes[f"{side}_a"], shapes[f"{side}_b"]
            if len(a) < 2 or len(b) < 2:
                return "broken-module", f"a factor is no matrix: {_listed(shapes)}"
            if a[1] != b[0]:
                return "rank-mismatch", f"ranks differ: {side}_a {list(a)}, {side}_b {list(b)}"
        if (shapes["w1_a"][0], shapes["w1_b"][1:]) != (shapes["w2_a"][0], shapes["w2_b"][1:]):
            return "broken-module", f"the two halves are of different size: {_listed(shapes)}"
    return "", ""


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())


def _turned(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a pair whose ranks differ fits when one or both are transposed, or when they change places."""
    up, down = shapes.get("up"), shapes.get("down")
    if up is None or down is None or len(up) != 2 or len(down) != 2 or "mid" in shapes:
        return False
    if up[1] == down[0]:
        return False
    small = min(up + down)
    return (up[0] == down[0] == small) or (up[1] == down[1] == small) or (up[0] == down[1] == small)


# ---------------------------------------------------------------- names


def _names(content: Content) -> Iterator[Finding]:
    reading = content.reading
    assert reading.detection is not None
    best = reading.detection.best
    if reading.detection.tie:
        message = f"could be any of {', '.join(reading.detection.tie)}"
        yield CHECK.finding("ambiguous-model", message, content.path, hint="name one with --base")
    elif best.architecture.open:
        runner = reading.detection.runner_up
        near = f"; nearest: {runner.architecture.title}, {runner.resolved:.0%} of the names" if runner else ""
        yield CHECK.finding("unknown-model", f"no known model has these names{near}", content.path)
    resolve = best.layout.resolver(best.architecture, content.bundle.metadata)
    for stem in [stem for stem in reading.groups if not resolve(stem)]:
        key = reading.groups[stem].keys[0]
        yield CHECK.finding(*_stranger(content, stem, best.architecture), key=stem, byte=byte_of(content, key))
    taken: dict[tuple[str, str], str] = {}
    for stem, group in reading.groups.items():
        if group.by_family and stem not in reading.problems:
            yield from _updated_twice(content, stem, taken)
    for key in reading.unknown:
        other = next((one for one in layouts().values() if one is not best.layout and one.split(key)), None)
        if other is not None:
            message = f"is in the {other.id} layout, the file in the {best.layout.id} layout"
            yield CHECK.finding("mixed-layouts", message, content.path, key=key, byte=byte_of(content, key))
        elif not _belongs(content, key):
            message = f"is no key of the {best.layout.id} layout"
            yield CHECK.finding("unread-key", message, content.path, key=key, byte=byte_of(content, key))


def _stranger(content: Content, stem: str, architecture: Architecture) -> tuple[str, str, str]:
    """A stem that the model does not know: of another layout, or of no model that is known."""
    reading = content.reading
    assert reading.detection is not None
    layout = reading.detection.best.layout
    for other in layouts().values():
        if other is not layout and not architecture.open and other.resolve(stem, architecture, {}):
            return "mixed-layouts", f"is a name of the {other.id} layout, the file is in {layout.id}", content.path
    return "unknown-module", f"{architecture.title} has no module of this name", content.path


def _updated_twice(content: Content, stem: str, taken: dict[tuple[str, str], str]) -> Iterator[Finding]:
    """Two stems that update the same weight."""
    from loratool.core.tolerant import same_targets

    assert content.reading.detection is not None
    best = content.reading.detection.best
    others = same_targets(stem, best.layout, best.architecture, content.bundle, taken)
    other = next((one for one in others if one != stem), None)
    if other is not None:
        key = content.reading.groups[stem].keys[0]
        message = f"updates what {other!r} updates: one module is spelled twice"
        yield CHECK.finding("spelled-twice", message, content.path, key=stem, byte=byte_of(content, key))


def _belongs(content: Content, key: str) -> bool:
    """Keys that a layout brings along: learned tokens, PEFT's whole modules, embeddings."""
    metadata = content.bundle.metadata
    whole = key.endswith((".weight", ".bias")) and bool(content.bundle.side_files)
    return metadata.get(key) == "<embed>" or whole or key.startswith(("bundle_emb.", "base_model.model."))


# ---------------------------------------------------------------- numbers in the header


def _alphas(content: Content, modules: tuple[Module, ...]) -> Iterator[Finding]:
    without = [m for m in modules if m.alpha is None]
    beside = [m for m in modules if ALPHA in m.keys]
    if without and len(without) < len(modules):
        message = f"{len(without)} of {len(modules)} modules have no alpha ({few([m.title for m in without])})"
        yield CHECK.finding("alpha-missing", message, content.path)
    for module in modules:
        if module.alpha is None:
            continue
        key = module.keys.get(ALPHA, module.title)
        code, message = _alpha(module.alpha, module.scale)
        if code:
            where = byte_of(content, key) if beside else None
            yield CHECK.finding(code, message, content.path, key=key, byte=where)


def _alpha(alpha: float, scale: float) -> tuple[str, str]:
    if not math.isfinite(alpha):
        return "alpha-not-finite", f"alpha is {alpha:g}"
    if alpha == 0:
        return "alpha-zero", "alpha is 0: the module does nothing"
    if not _TINY <= abs(scale) <= _HUGE:
        return "alpha-absurd", f"alpha is {alpha:g}: the update is scaled by {scale:g}"
    if alpha < 0:
        return "alpha-negative", f"alpha is {alpha:g}: the update is subtracted"
    return "", ""


def _dtypes(content: Content, modules: tuple[Module, ...]) -> Iterator[Finding]:
    counted = Counter(factor.dtype for module in modules for factor in module.factors.values())
    odd = [m for m in modules if len({factor.dtype for factor in m.factors.values()}) > 1]
    if odd:
        message = f"{len(odd)} modules have factors of different dtypes ({few([m.title for m in odd])})"
        yield CHECK.finding("mixed-dtypes", message, content.path, severity=WARNING)
    elif len(counted) > 1:
        message = ", ".join(f"{count} factors of {dtype}" for dtype, count in counted.most_common())
        yield CHECK.finding("mixed-dtypes", message, content.path)


def _sizes(content: Content, modules: tuple[Module, ...]) -> Iterator[Finding]:
    adapter = content.reading.adapter
    assert adapter is not None
    if adapter.architecture.open:
        return
    odd = [module for module in modules if not fits(module.targets, module.shape)]
    if len(odd) == len(modules) and odd:
        module = odd[0]
        message = f"no module has a size of {adapter.architecture.title}'s: {module.title} is {list(module.shape)}"
        hint = "a distilled or pruned model has its own widths; any other program will refuse the file"
        yield CHECK.finding("other-width", message, content.path, hint=hint)
        return
    for module in odd:
        if _swapped(module):
            key = module.keys["up"]
            message = "up and down have changed places: swapped, they would fit"
            yield CHECK.finding("transposed", message, content.path, key=key, byte=byte_of(content, key))
            continue
        rows = sum(target.rows for target in module.targets)
        expected = [rows, *module.targets[0].shape[1:]]
        key = next(iter(module.keys.values()))
        message = f"updates a weight of {list(module.shape)}, {adapter.architecture.title} has {expected}"
        yield CHECK.finding("other-shape", message, content.path, key=key, byte=byte_of(content, key))


def _swapped(module: Module) -> bool:
    """Whether a pair would have the model's size if up and down changed places."""
    shapes = module.shapes
    if shapes.keys() != {"up", "down"} or any(len(shape) != 2 for shape in shapes.values()):
        return False
    return fits(module.targets, (shapes["down"][0], shapes["up"][1]))


def _claims(content: Content, architecture: Architecture) -> Iterator[Finding]:
    """What the metadata say of the model."""
    metadata = content.bundle.metadata
    if architecture.open:
        return
    for name in ("modelspec.architecture", "ss_base_model_version"):
        value = metadata.get(name)
        meant = [other for other in architectures().values() if value and other.facts.get(name) == value]
        if meant and architecture not in meant:
            message = f"{name} is {value!r}, which is {meant[0].title}; the keys are {architecture.title}'s"
            yield CHECK.finding("metadata-mismatch", message, content.path, key=name)


def _base(content: Content) -> Iterator[Finding]:
    if content.base_error is not None:
        yield CHECK.finding("base-unusable", content.base_error.message, content.base_error.file or content.base or "")
    for misfit in content.misfits:
        code, byte = ("not-in-base" if misfit.missing else "base-shape"), byte_of(content, misfit.key)
        yield CHECK.finding(code, misfit.message, content.path, key=misfit.key, byte=byte)


CHECK = Check("adapter", "The adapter", "content", _CODES, _run)
