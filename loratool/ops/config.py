"""Config: the user's own file of names and folders, `~/.config/loratool/config.yaml`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.core.errors import LoratoolError, UsageError
from loratool.files.atomic import atomic_write

if TYPE_CHECKING:
    import yaml

KEYS = ("bases", "roots", "loras")
"""What the file may say: names of base models, install folders of programs, folders of LoRAs."""

_NO_BREAKS = 1 << 16
_HINT = "see docs/bases.md for an example"


@dataclass(frozen=True)
class Config:
    """What the config file says; empty where there is none. Relative paths in it start at its folder.

    `bases` maps names to checkpoints, `roots` are install folders of programs, `loras` folders of LoRAs. `unknown` are
    keys that mean nothing to this version.
    """

    path: Path
    exists: bool = False
    bases: Mapping[str, Path] = field(default_factory=dict)
    roots: tuple[Path, ...] = ()
    loras: tuple[Path, ...] = ()
    unknown: tuple[str, ...] = ()


def config_path(environ: Mapping[str, str], home: Path) -> Path:
    """Where the config file is, or would be: LORATOOL_CONFIG, else below XDG_CONFIG_HOME or `~/.config`."""
    if named := environ.get("LORATOOL_CONFIG"):
        return absolute(named, home)
    folder = environ.get("XDG_CONFIG_HOME")
    return (absolute(folder, home) if folder else home / ".config") / "loratool" / "config.yaml"


def absolute(text: str, home: Path, beside: Path | None = None) -> Path:
    """A path as a user writes it: `~` is the home folder, a relative one starts at `beside` or the current folder."""
    if text == "~" or text.startswith(("~/", "~\\")):
        return home / text[2:]
    return Path(os.path.abspath(text)) if beside is None else Path(os.path.normpath(beside / text))


def read_config(environ: Mapping[str, str], home: Path) -> Config:
    """The config. Raises UsageError, with file and line, for what is no YAML and for entries of the wrong kind."""
    path = config_path(environ, home)
    text = _text(path)
    if text is None:
        return Config(path)
    root = _root(text, path)
    entries = dict(_pairs(root, path)) if root is not None else {}
    bases = dict(_pairs(entries["bases"], path)) if "bases" in entries else {}
    return Config(
        path,
        True,
        {name: absolute(_scalar(node, path, name), home, path.parent) for name, node in bases.items()},
        tuple(_folders(entries.get("roots"), "roots", path, home)),
        tuple(_folders(entries.get("loras"), "loras", path, home)),
        tuple(key for key in entries if key not in KEYS),
    )


def write_base(config: Config, name: str, target: Path) -> None:
    """Says in the config file that `name` is `target`; everything else in it stays. Creates the file and its folder."""
    text = _text(config.path) or ""
    place = Path(os.path.realpath(config.path))  # a link (to a user's collection of dot files) stays one
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoratoolError(f"its folder cannot be made: {error.strerror}", file=str(config.path)) from error
    edited = _with_base(text, config.path, name, str(target)).encode("utf-8")
    try:
        with atomic_write(place, overwrite=True) as temporary:
            temporary.write_bytes(edited)
    except OSError as error:
        raise LoratoolError(f"cannot be written: {error.strerror}", file=str(config.path)) from error


def _with_base(text: str, path: Path, name: str, target: str) -> str:
    """The file's text with the entry, and everything else as it is. Raises UsageError where it cannot be put in."""
    before = _root(text, path)
    edited = _edited(text, before, name, target)
    try:
        after = _root(edited, path)
    except UsageError:
        after = None
    bases = _entries(_entries(after).get("bases"))
    others = _written(before, "bases") == _written(after, "bases")
    known = _written(_entries(before).get("bases"), name) == _written(_entries(after).get("bases"), name)
    if others and known and name in bases and (bases[name].tag, bases[name].value) == (_TEXT, target):
        return edited
    raise UsageError(f"cannot be edited; write it there by hand: {name}: {target}", file=str(path), key="bases")


_TEXT = "tag:yaml.org,2002:str"


def _entries(node: yaml.Node | None) -> dict[str, Any]:
    """Keys and values of a mapping; of anything else none."""
    import yaml

    return {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def _written(node: yaml.Node | None, but: str) -> dict[str, str]:
    """The entries of a mapping but for one, as they are written: what `on`, `010` or a tag of the user's own means is
    nobody's business here."""
    import yaml

    return {key: yaml.serialize(value, Dumper=yaml.SafeDumper) for key, value in _entries(node).items() if key != but}


def _edited(text: str, root: Any, name: str, target: str) -> str:
    """`text` with the entry put into its lines."""
    import yaml

    value = yaml.safe_dump(target, allow_unicode=True, width=_NO_BREAKS).removesuffix("...\n").strip()
    end = "\r\n" if "\r\n" in text else "\n"
    entry = yaml.safe_dump({name: target}, allow_unicode=True, width=_NO_BREAKS, line_break=end)
    bases = _entries(root).get("bases")
    if bases is None:
        return f"{text.rstrip()}{end}bases:{end}  {entry}".lstrip("\r\n")
    key = next(key for key, node in root.value if node is bases)
    if _empty(bases):
        return _put(text, text.index(":", key.end_mark.index) + 1, f"{end}  {entry.rstrip()}")
    if bases.flow_style:  # between braces: text in double quotes is the same in JSON
        value = json.dumps(target, ensure_ascii=False)
        entry = f"{json.dumps(name, ensure_ascii=False)}: {value}, "
    if old := _entries(bases).get(name):
        return _put(text, old.start_mark.index, value, old.end_mark.index)
    if bases.flow_style:
        return _put(text, bases.start_mark.index + 1, entry)
    first = bases.value[0][0].start_mark
    return _put(text, first.index, entry + " " * first.column)


def _put(text: str, start: int, new: str, stop: int | None = None) -> str:
    return text[:start] + new + text[start if stop is None else stop :]


# -- reading: nodes, not values, because they know their lines -------------------------------------------------------


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")  # ends of lines and a mark at the start stay: YAML knows them
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8 text", file=str(path), hint=_HINT) from error


def _root(text: str, path: Path) -> yaml.Node | None:
    import yaml

    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or "it is no text of that kind"
        raise UsageError(f"{line}is no YAML: {problem}", file=str(path), hint="correct the line") from error
    return root


def _pairs(node: yaml.Node, path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """The entries of a mapping; none where nothing stands behind the colon."""
    import yaml

    if _empty(node):
        return
    if not isinstance(node, yaml.MappingNode):
        raise _wrong(node, path, "expected entries of the form `name: ...`")
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key.value, str) or not key.value:
            raise _wrong(key, path, "a name is one text")
        if key.value in seen:
            raise _wrong(key, path, "stands twice", key.value)
        seen.add(key.value)
        yield key.value, value


def _folders(node: yaml.Node | None, name: str, path: Path, home: Path) -> Iterator[Path]:
    """The folders of a list; one text is a list of one."""
    import yaml

    if node is None or _empty(node):
        return
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        yield absolute(_scalar(item, path, name), home, path.parent)


def _scalar(node: yaml.Node, path: Path, name: str) -> str:
    import yaml

    if not isinstance(node, yaml.ScalarNode) or _empty(node) or "\0" in node.value:
        raise _wrong(node, path, "expected a path", name)
    text: str = node.value
    return text


def _empty(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null" or node.value == ""


def _wrong(node: yaml.Node, path: Path, message: str, key: str | None = None) -> UsageError:
    return UsageError(f"line {node.start_mark.line + 1}: {message}", file=str(path), key=key, hint=_HINT)
