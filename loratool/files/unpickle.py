"""Unpickle: a pickle as inert data. Nothing that a file names is ever imported, looked up or called.

A pickle is a program for a stack machine. This is such a machine, with all opcodes that weights need. A global is its
name, nothing else; a call of one is a function of `meanings`, or an error. Dicts are lists of pairs: no key is hashed
or compared. Every limit is checked before what it limits is made.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from loratool.core.errors import FormatError

MAX_PICKLE = 16 << 20
"""Bytes of a pickle that are looked at. A checkpoint of 10,000 tensors has 2 MiB."""

MAX_STEPS = 600_000
"""Opcodes: 18,000 tensors take that many. They take half a second."""

MAX_TEXT = 1 << 20
"""Bytes of one text."""

MAX_NAME = 256
MAX_INTEGER = 64
"""Bytes of one integer. Sizes have 8; the rest is for the state of random generators."""

_DAMAGED = "the file is damaged or was made to do harm"
_CODE = "do not open it with anything else: what it asks for can run code on your machine"


@dataclass(frozen=True)
class Global:
    """A name of something in Python (`collections.OrderedDict`). Only the name: nothing stands behind it."""

    name: str


@dataclass(eq=False, slots=True)
class Table:
    """A dict as a pickle spells it: pairs in order, keys never compared. `state` is what was set on it."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    state: Any = None


@dataclass(frozen=True)
class Meanings:
    """What the names and persistent ids of a file mean to us.

    `names` are the globals that may be named, with what to do if one is called (None: it may not be); `refused` has
    a word about others, by the beginning of their names. `persistent` makes the object of a persistent id. Objects of
    the types `stateful` keep a state that is set on them as their `state`; all others refuse it.
    """

    names: Mapping[str, Callable[..., Any] | None]
    refused: Mapping[str, str]
    persistent: Callable[[Any], Any]
    stateful: tuple[type, ...] = (Table,)


def unpickle(data: bytes, meanings: Meanings, start: int = 0, most: int = MAX_STEPS) -> tuple[Any, int]:
    """The object of the pickle at `start`, of at most `most` opcodes, and the byte behind it.

    Raises FormatError for what is no pickle, for a pickle that asks for a name outside `meanings`, which it names, and
    for one beyond the limits.
    """
    machine = _Machine(data, meanings, start)
    try:
        return machine.run(most), machine.at
    except IndexError:
        raise machine.broken("finds nothing on the stack") from None


class _Machine:
    """The stack machine: `stack` since the last mark, `marks` the stacks below it."""

    __slots__ = ("at", "data", "globals", "marks", "meanings", "memo", "op", "stack")

    def __init__(self, data: bytes, meanings: Meanings, start: int) -> None:
        self.data, self.meanings, self.at, self.op = data, meanings, start, start
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Global] = {}

    def run(self, most: int) -> Any:
        data, handlers = self.data, _HANDLERS
        for _ in range(most):
            self.op = at = self.at
            if at >= len(data):
                raise self.cut()
            self.at = at + 1
            code = data[at]
            handler = handlers[code]
            if handler is None:
                if code == _STOP:
                    return self.stack.pop()
                self.refuse(code)
            handler(self)
        raise FormatError(f"has a pickle of more than {most} opcodes", hint=_DAMAGED)

    def broken(self, what: str) -> FormatError:
        """An error about the opcode that is being run."""
        return FormatError(f"has a broken pickle: opcode {self.data[self.op]:#04x} at {self.op} {what}", hint=_DAMAGED)

    def cut(self) -> FormatError:
        if len(self.data) >= MAX_PICKLE:
            return FormatError(f"has a pickle of more than {MAX_PICKLE >> 20} MiB", hint=_DAMAGED)
        return FormatError(
            f"has a pickle that is cut off at {len(self.data)}",
            hint="the download or copy is incomplete: fetch the file again",
        )

    def refuse(self, code: int) -> NoReturn:
        name = _REFUSED.get(code)
        if name is None:
            raise self.broken("is none that a pickle has")
        if code in b"io":
            # They name and call at once; the name is what a reader of the message wants.
            named = self.named_by_lines() if code == b"i"[0] else next(iter(self.stack), None)
            name = f"{named.name if isinstance(named, Global) else 'something'} by {name}"
        raise FormatError(f"asks for {name}, which no file of weights needs", hint=_CODE)

    # -- reading the program -----------------------------------------------------------------------------------

    def take(self, size: int, most: int, what: str) -> bytes:
        """The next bytes of the program. Raises FormatError for more than `most`, before anything is copied."""
        if not 0 <= size <= most:
            raise FormatError(f"has {what} of {size} bytes in its pickle, expected at most {most}", hint=_DAMAGED)
        stop = self.at + size
        if stop > len(self.data):
            raise self.cut()
        found = self.data[self.at : stop]
        self.at = stop
        return found

    def byte(self) -> int:
        at = self.at
        if at >= len(self.data):
            raise self.cut()
        self.at = at + 1
        return self.data[at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size, 8, "a number"), "little", signed=signed)

    def line(self, what: str, most: int = MAX_NAME) -> bytes:
        stop = self.data.find(b"\n", self.at, self.at + most + 1)
        if stop < 0:
            raise self.cut() if self.at + most >= len(self.data) else self.broken(f"has {what} of more than {most}")
        found = self.data[self.at : stop]
        self.at = stop + 1
        return found

    def text(self, size: int) -> str:
        try:
            return self.take(size, MAX_TEXT, "a text").decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken("has a text that is not UTF-8") from None

    # -- the stack ---------------------------------------------------------------------------------------------

    def to_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self.marks.pop()
        return found

    def top(self, kind: type, what: str) -> Any:
        found = self.stack[-1]
        if type(found) is not kind:
            raise self.broken(f"expects {what} on the stack")
        return found

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise self.broken(f"asks for entry {key} of the memo, which is not there")
        self.stack.append(self.memo[key])

    def put_pairs(self, table: Table, flat: list[Any]) -> None:
        if len(flat) % 2:
            raise self.broken("has a key without a value")
        table.pairs.extend(zip(flat[::2], flat[1::2]))

    # -- names and calls ---------------------------------------------------------------------------------------

    def named(self, module: str, name: str) -> Global:
        """The marker for a name that a file may say; raises FormatError for any other."""
        full = f"{module}.{name}"
        found = self.globals.get(full)
        if found is not None:
            return found
        if len(full) > 2 * MAX_NAME:
            raise FormatError(f"asks for {full[:MAX_NAME]}..., a name of {len(full)} letters", hint=_CODE)
        if full not in self.meanings.names:
            why = next((why for start, why in self.meanings.refused.items() if full.startswith(start)), None)
            if why is None:
                raise FormatError(f"asks for {full}, which no file of weights needs", hint=_CODE)
            raise FormatError(f"asks for {full} ({why}), which is not read", hint="save its plain tensors alone")
        return self.globals.setdefault(full, Global(full))

    def named_by_lines(self) -> Global:
        module, name = (self.line("a name").decode("utf-8", "replace") for _ in range(2))
        return self.named(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global:
            raise self.broken("calls something that is no name")
        known = self.meanings.names[function.name]
        if known is None or type(arguments) is not tuple:
            raise self.broken(f"calls {function.name}, which is only a name here")
        try:
            self.stack.append(known(*arguments))
        except TypeError:
            raise self.broken(f"calls {function.name} with {len(arguments)} arguments") from None

    def build(self) -> None:
        state, found = self.stack.pop(), self.stack[-1]
        if type(found) not in self.meanings.stateful:
            raise self.broken("sets the state of something that has none")
        found.state = state


def _line_integer(machine: _Machine) -> int | bool:
    line = machine.line("a number", MAX_INTEGER)
    if line in (b"00", b"01"):
        return line == b"01"
    try:
        return int(line.removesuffix(b"L"))
    except ValueError:
        raise machine.broken("has a number that is none") from None


def _long(machine: _Machine, width: int) -> int:
    size = machine.byte() if width == 1 else machine.number(width, signed=True)
    return int.from_bytes(machine.take(size, MAX_INTEGER, "an integer"), "little", signed=True)


def _line_float(machine: _Machine) -> float:
    try:
        return float(machine.line("a number", MAX_INTEGER))
    except ValueError:
        raise machine.broken("has a number that is none") from None


def _line_text(machine: _Machine) -> str:
    try:
        text = machine.line("a text", MAX_TEXT).decode("raw-unicode-escape")
        text.encode("utf-8")  # an escape can spell half a surrogate pair, which is no text
    except UnicodeError:
        raise machine.broken("has a text that is none") from None
    return text


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def handler(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return handler


def _mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.to_mark()


def _tuple(count: int) -> Callable[[_Machine], None]:
    def handler(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]

    return handler


def _marked(make: Callable[[list[Any]], Any]) -> Callable[[_Machine], None]:
    def handler(machine: _Machine) -> None:
        found = machine.to_mark()
        machine.stack.append(make(found))

    return handler


def _marked_table(machine: _Machine) -> None:
    flat, table = machine.to_mark(), Table()
    machine.put_pairs(table, flat)
    machine.stack.append(table)


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    machine.top(list, "a list").append(value)


def _appends(machine: _Machine) -> None:
    values = machine.to_mark()
    machine.top(list, "a list").extend(values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.put_pairs(machine.top(Table, "a dict"), [key, value])


def _set_items(machine: _Machine) -> None:
    flat = machine.to_mark()
    machine.put_pairs(machine.top(Table, "a dict"), flat)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise machine.broken("names something by what is no text")
    machine.stack.append(machine.named(module, name))


def _protocol(machine: _Machine) -> None:
    version = machine.byte()
    if version > 5:
        raise FormatError(f"has a pickle of protocol {version}, expected at most 5", hint=_DAMAGED)


_Handler = Callable[[_Machine], None]
_STOP = ord(".")
_KNOWN: dict[bytes, _Handler] = {
    b"\x80": _protocol,
    b"\x95": lambda m: (m.number(8), None)[1],  # a frame: its length says nothing that the opcodes do not
    b"(": _mark,
    b"0": _pop,
    b"1": lambda m: (m.to_mark(), None)[1],
    b"2": _push(lambda m: m.stack[-1]),
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"I": _push(_line_integer),
    b"L": _push(_line_integer),
    b"J": _push(lambda m: m.number(4, signed=True)),
    b"K": _push(lambda m: m.byte()),
    b"M": _push(lambda m: m.number(2)),
    b"\x8a": _push(lambda m: _long(m, 1)),
    b"\x8b": _push(lambda m: _long(m, 4)),
    b"F": _push(_line_float),
    b"G": _push(lambda m: struct.unpack(">d", m.take(8, 8, "a number"))[0]),
    b"V": _push(_line_text),
    b"X": _push(lambda m: m.text(m.number(4))),
    b"\x8c": _push(lambda m: m.text(m.byte())),
    b"\x8d": _push(lambda m: m.text(m.number(8))),
    b"U": _push(lambda m: m.text(m.byte())),  # text of Python 2
    b"T": _push(lambda m: m.text(m.number(4, signed=True))),
    b"B": _push(lambda m: m.take(m.number(4), MAX_TEXT, "bytes")),
    b"C": _push(lambda m: m.take(m.byte(), MAX_TEXT, "bytes")),
    b"\x8e": _push(lambda m: m.take(m.number(8), MAX_TEXT, "bytes")),
    b"]": _push(lambda m: []),
    b"}": _push(lambda m: Table()),
    b")": _push(lambda m: ()),
    b"\x8f": _push(lambda m: []),  # a set
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": _marked(tuple),
    b"l": _marked(list),
    b"\x91": _marked(list),  # a frozen set
    b"d": _marked_table,
    b"a": _append,
    b"e": _appends,
    b"\x90": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"p": lambda m: m.remember(int(_line_integer(m))),
    b"q": lambda m: m.remember(m.byte()),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.recall(int(_line_integer(m))),
    b"h": lambda m: m.recall(m.byte()),
    b"j": lambda m: m.recall(m.number(4)),
    b"c": _push(lambda m: m.named_by_lines()),
    b"\x93": _stack_global,
    b"Q": _push(lambda m: m.meanings.persistent(m.stack.pop())),
    b"R": lambda m: m.call(),
    b"\x81": lambda m: m.call(),
    b"b": lambda m: m.build(),
}
_REFUSED = {
    ord("S"): "text in the spelling of Python 2 (STRING)",
    ord("P"): "an object by a line of text (PERSID)",
    ord("i"): "the opcode INST",
    ord("o"): "the opcode OBJ",
    0x82: "an entry of the extension registry (EXT1)",
    0x83: "an entry of the extension registry (EXT2)",
    0x84: "an entry of the extension registry (EXT4)",
    0x92: "an object with named arguments (NEWOBJ_EX)",
    0x96: "a byte array (BYTEARRAY8)",
    0x97: "memory outside the pickle (NEXT_BUFFER)",
    0x98: "memory outside the pickle (READONLY_BUFFER)",
}
_HANDLERS: list[_Handler | None] = [_KNOWN.get(bytes([code])) for code in range(256)]
