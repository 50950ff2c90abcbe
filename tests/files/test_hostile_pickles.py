"""Pickles and archives made to do harm: one a line, with what must be said of it.

All are read by one process with an audit hook and limits: nothing may be imported, looked up, compiled or run, no file
but the one named may be opened, and each takes less than two seconds.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loratool.core.errors import FormatError
from loratool.files.pickles import read_pickle
from tests.pickles import (
    EMPTY,
    SIX,
    Called,
    Kept,
    Name,
    Record,
    With,
    legacy,
    pickled,
    spelled,
    storage,
    tensor,
    torch_zip,
    zip_of,
)

MIB = 1 << 20
SENTINEL = "sentinel"
TOUCH = f"touch {SENTINEL}"


class Runs:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def calls(name: str, *arguments: Any) -> bytes:
    return torch_zip({"a": Called(name, arguments)})


def raw(code: bytes) -> bytes:
    """A pickle of these opcodes, in a PyTorch file."""
    return torch_zip(b"\x80\x04" + code + b".")


def one(**arguments: Any) -> bytes:
    return torch_zip({"a": tensor(**arguments)})


def stack_global(module: str, name: str) -> bytes:
    return spelled(module) + spelled(name) + b"\x93"


def chained() -> Any:
    """`getattr(__import__("os"), "system")("...")`, as gadgets do it."""
    return Called("builtins.getattr", (Called("builtins.__import__", ("os",)), "system"))


def nested(opener: bytes, depth: int, closer: bytes) -> bytes:
    return opener * depth + closer * depth


LAUGH = b"](K\1K\1e\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60))
LAUGH_DICTS = b"}(X\1\0\0\0aK\1u\x94" + b"".join(b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cu\x94" % (i, i) for i in range(60))
LONG_NAMES = b"X\0\0\x10\0" + b"n" * MIB + b"\x94}" + b"h\0}" * 60 + b"s" * 60

ASKS = {
    "os.system": (calls("os.system", TOUCH), r"asks for os\.system, which no file of weights needs; do not open it"),
    "posix.system, legacy": (legacy({"a": Called("posix.system", (TOUCH,))}), r"asks for posix\.system"),
    "nt.system, first of five": (pickled(Called("nt.system", (TOUCH,))), r"asks for nt\.system"),
    "in the list of keys": (legacy({"a": tensor()}, Called("os.system", (TOUCH,))), r"asks for os\.system"),
    "in the facts": (legacy({"a": tensor()}, facts=Called("os.system", (TOUCH,))), r"asks for os\.system"),
    "in the key of a storage": (one(kept=storage(Called("os.system", (TOUCH,)))), r"asks for os\.system"),
    "in a size": (one(size=Called("os.system", (TOUCH,))), r"asks for os\.system"),
    "in hooks": (one(hooks=Called("os.system", (TOUCH,))), r"asks for os\.system"),
    "behind the object": (legacy({"a": tensor()}) + pickled(Called("os.system", (TOUCH,))), r"behind its last storage"),
    "behind data.pkl": (torch_zip(pickled({"a": tensor()}) + b"cos\nsystem\n."), r"12 bytes behind its pickle"),
    "eval": (calls("builtins.eval", "1"), r"asks for builtins\.eval"),
    "exec": (calls("builtins.exec", "1"), r"asks for builtins\.exec"),
    "exec of Python 2": (calls("__builtin__.execfile", "1"), r"asks for __builtin__\.execfile"),
    "getattr": (torch_zip({"a": chained()}), r"asks for builtins\.getattr"),
    "subprocess": (calls("subprocess.Popen", ["sh"]), r"asks for subprocess\.Popen"),
    "torch.hub": (calls("torch.hub.load", "x/y", "z"), r"asks for torch\.hub\.load"),
    "torch.load": (calls("torch.load", "x"), r"asks for torch\.load"),
    "torch.jit": (calls("torch.jit.unsupported_tensor_ops.execWrapper", "1"), r"asks for torch\.jit\.unsupp"),
    "torch.storage": (calls("torch.storage._load_from_bytes", b"x"), r"_load_from_bytes \(a tensor that was pickled"),
    "numpy's eval": (calls("numpy.testing._private.utils.runstring", "1", {}), r"asks for numpy\.testing\._priv"),
    "runpy": (calls("runpy._run_code", "1"), r"asks for runpy\._run_code"),
    "pickle in pickle": (calls("pickle.loads", b"x"), r"asks for pickle\.loads"),
    "webbrowser": (calls("webbrowser.open", "http://x"), r"asks for webbrowser\.open"),
    "a name with dots": (
        raw(stack_global("torch", "_utils._rebuild_tensor_v2.__globals__")),
        r"asks for torch\._utils",
    ),
    "another split of a name": (raw(stack_global("torch._utils", "x") + b")R"), r"asks for torch\._utils\.x"),
    "a name that is only named": (raw(b"cos\nsystem\n0N"), r"asks for os\.system"),
    "a name in a key": (raw(b"}cos\nsystem\nNs"), r"asks for os\.system"),
    "STACK_GLOBAL": (raw(stack_global("os", "system")), r"asks for os\.system"),
    "STACK_GLOBAL of numbers": (raw(b"K\1K\1\x93"), r"names something by what is no text"),
    "INST": (raw(b"(X\1\0\0\0xios\nsystem\n"), r"asks for os\.system"),
    "INST of a good name": (raw(b"(icollections\nOrderedDict\n"), r"asks for collections\.OrderedDict by the opcode I"),
    "OBJ": (raw(b"(ccollections\nOrderedDict\no"), r"asks for collections\.OrderedDict by the opcode OBJ"),
    "OBJ of nothing": (raw(b"(o"), r"asks for something by the opcode OBJ"),
    "NEWOBJ": (raw(b"cos\nsystem\n)\x81"), r"asks for os\.system"),
    "NEWOBJ_EX": (raw(b"ccollections\nOrderedDict\n)}\x92"), r"asks for an object with named arguments"),
    "EXT1": (raw(b"\x82\1"), r"asks for an entry of the extension registry"),
    "EXT4": (raw(b"\x84\1\0\0\0"), r"asks for an entry of the extension registry"),
    "PERSID": (raw(b"Pos.system\n"), r"asks for an object by a line of text"),
    "buffers": (raw(b"\x97"), r"asks for memory outside"),
    "a byte array": (raw(b"\x96\1\0\0\0\0\0\0\0a"), r"asks for a byte array"),
    "STRING": (raw(b"S'x'\n"), r"asks for text in the spelling of Python 2"),
    "protocol 0": (pickle.dumps(Runs(eval, "1"), 0), r"asks for builtins\.eval|asks for __builtin__\.eval"),
    "a terminal escape": (calls("os\x1b[31m.system\u202e", "x"), r"asks for os\\x1b\[31m\.system\\u202e"),
    "markup": (calls("[red]os.system", "x"), r"asks for \[red\]os\.system"),
    "a name that is no text": (raw(b"cos\xff\nsys\n"), r"asks for os\\ufffd\.sys|asks for os"),
    "a name of a MiB": (raw(stack_global("o" * MIB, "s" * MIB)), r"asks for o+\.\.\., a name of 2097153 letters"),
    "a module of a MiB": (one(kept=Kept(("m" * MIB,))), r"asks for m+ by a persistent id"),
    "a name of 2,000 letters": (raw(b"c" + b"n" * 2000 + b"\nx\n"), r"has a name of more than 256"),
    "a storage of another kind": (
        one(kept=Kept(("storage", Name("os.system"), "0", "cpu", 6))),
        r"asks for os\.system",
    ),
    "a module by its id": (one(kept=Kept(("module", "x", "y.py", "source"))), r"asks for module by a persistent id"),
}
CALLS = {
    "a kind of storage": (calls("torch.FloatStorage", 6), r"calls torch\.FloatStorage, which is only a name here"),
    "a dtype": (calls("torch.float32"), r"calls torch\.float32, which is only a name"),
    "a class of Lightning": (
        calls("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
        r"ModelCheckpoint, which is only a name",
    ),
    "no tuple": (raw(b"ccollections\nOrderedDict\n]R"), r"which is only a name here"),
    "too many": (calls("collections.OrderedDict", 1, 2), r"OrderedDict.*with 2 arguments|unpack|with 2"),
    "too few": (calls("torch._utils._rebuild_tensor_v2", 1), r"_rebuild_tensor_v2 with 1 arguments"),
    "a number": (raw(b"K\1)R"), r"calls something that is no name"),
    "the state of a list": (raw(b"]}b"), r"sets the state of something that has none"),
    "the state of a name": (raw(b"ccollections\nOrderedDict\n}b"), r"sets the state of something that has none"),
    "the state of a tensor": (torch_zip({"a": With(tensor(), {"__class__": 1})}), r"sets the state of something"),
    "an OrderedDict of numbers": (calls("collections.OrderedDict", [1, 2]), r"what is no list of pairs"),
    "a parameter of a number": (calls("torch._utils._rebuild_parameter", 1, True, EMPTY), r"parameter that is no tens"),
    "bytes of another code": (calls("_codecs.encode", "x", "rot13"), r"bytes that are spelled in an unknown way"),
    "bytes that are none": (calls("_codecs.encode", "€", "latin1"), r"bytes that are spelled in an unknown way"),
    "a numpy object": (
        calls("numpy.core.multiarray.scalar", Called("numpy.dtype", ("O8", False, True)), b"x"),
        r"numpy number of an unknown kind",
    ),
    "a numpy number cut": (
        calls("numpy.core.multiarray.scalar", Called("numpy.dtype", ("f8", False, True)), b"x"),
        r"numpy number of an unknown kind",
    ),
    "a numpy number of nothing": (calls("numpy.core.multiarray.scalar", 1, b"x"), r"numpy number of an unknown kind"),
}
BOMBS = {
    "calls in calls": (
        raw(b"ccollections\nOrderedDict\n" * 30_000 + b")R" * 30_000),
        r"calls something that is no name",
    ),
    "too many opcodes": (raw(b"N0" * 300_001), r"more than 600000 opcodes"),
    "memo": (raw(b"N" + b"\x94" * 600_000), r"more than 600000 opcodes"),
    "dicts": (raw(b"}\x94" * 290_000), r"is a pickle without tensors"),
    "marks": (raw(b"(" * 590_000), r"finds nothing on the stack"),
    "a pickle of 17 MiB": (torch_zip(pickled({"a": tensor()}).ljust(17 * MIB, b"N")), r"expected at most 16777216"),
    "a pickle of 17 MiB, legacy": (b"\x80\x02" + b"X\0\0\x10\0".ljust(MIB + 5) * 17, r"of more than 16 MiB"),
    "texts": (raw((b"X\0\0\x10\0" + "😀".encode().ljust(MIB)) * 15), r"is a pickle without tensors"),
    "a text of 4 GiB": (raw(b"X\xff\xff\xff\xff"), r"a text of 4294967295 bytes in its pickle, expected at most"),
    "a text of 16 EiB": (raw(b"\x8d" + b"\xff" * 8), r"a text of 18446744073709551615 bytes"),
    "a text of less than nothing": (raw(b"T\xff\xff\xff\xff"), r"a text of -1 bytes"),
    "bytes of 16 EiB": (raw(b"\x8e" + b"\xff" * 8), r"has bytes of 18446744073709551615 bytes"),
    "LONG4": (raw(b"\x8b\0\0\0\1" + bytes(16)), r"an integer of 16777216 bytes in its pickle, expected at most 64"),
    "LONG4 of less than nothing": (raw(b"\x8b\xff\xff\xff\xff"), r"an integer of -1 bytes"),
    "LONG1": (raw(b"\x8a\xff" + b"\1" * 255), r"an integer of 255 bytes"),
    "a number of 5,000 digits": (raw(b"L" + b"9" * 5000 + b"L\n"), r"has a number of more than 64"),
    "a number that is none": (raw(b"Ix\n"), r"has a number that is none"),
    "a fraction that is none": (raw(b"Fx\n"), r"has a number that is none"),
    "a frame of 16 EiB": (raw(b"\x95" + b"\xff" * 8 + b"N"), r"is a pickle without tensors"),
    "tuples in tuples": (raw(b")" + b"\x85" * 590_000), r"nested more than 64 deep"),
    "lists in lists": (raw(nested(b"]", 900, b"a"[:0]) + b"a" * 899), r"nested more than 64 deep"),
    "dicts in dicts": (raw(b"}K\1" * 900 + b"N" + b"s" * 900), r"nested more than 64 deep"),
    "a list in itself": (raw(b"]\x94h\0a"), r"holds itself"),
    "a dict in itself": (raw(b"}\x94(X\1\0\0\0ah\0u"), r"a: holds itself"),
    "a tuple in itself": (raw(b"]\x94h\0\x85\x94h\0h\1a0h\1"), r"holds itself"),
    "a state in itself": (raw(b"}\x94h\0b"), r"is a pickle without tensors"),
    "a billion laughs": (raw(LAUGH), r"unfolds into more than 600000 values"),
    "a billion laughs of dicts": (raw(LAUGH_DICTS), r"unfolds into more than 600000 values"),
    "names of a MiB in one another": (raw(LONG_NAMES), r"unfolds into more than"),
    "keys that are lists": (raw(b"}](]]]eNs"), r"is a pickle without tensors"),
    "a zip bomb": (zip_of([Record(b"a/data.pkl", b"\0", 8)]), r"a/data\.pkl: is compressed \(method 8\).*zip bomb"),
}
BROKEN = {
    "nothing": (b"\x80\x02.", r"finds nothing on the stack"),
    "no stop": (torch_zip(b"\x80\x02N"), r"is cut off at 3; the download"),
    "an opcode that is none": (raw(b"\xff"), r"opcode 0xff at 2 is none that a pickle has"),
    "protocol 6": (torch_zip(b"\x80\x06N."), r"of protocol 6, expected at most 5"),
    "a text that is cut off": (torch_zip(b"\x80\x02X\xff\0\0\0abc"), r"is cut off"),
    "a name that is cut off": (torch_zip(b"\x80\x02cos"), r"is cut off"),
    "a text that is no UTF-8": (raw(b"X\1\0\0\0\xff"), r"has a text that is not UTF-8"),
    "half a surrogate pair": (raw(b"V\\ud800\n"), r"has a text that is none"),
    "an escape that is none": (raw(b"V\\u12\n"), r"has a text that is none"),
    "a memo that is not there": (raw(b"h\1"), r"asks for entry 1 of the memo, which is not there"),
    "a tuple of too few": (raw(b"N\x87"), r"finds nothing on the stack"),
    "a mark that is not there": (raw(b"Nt"), r"finds nothing on the stack"),
    "a key without a value": (raw(b"}(Nu"), r"has a key without a value"),
    "an item for no dict": (raw(b"]NNs"), r"expects a dict on the stack"),
    "an item for no list": (raw(b"}Na"), r"expects a list on the stack"),
    "two entries of one name": (
        torch_zip({"a": tensor(), "b": {"c": tensor()}, "b.c": tensor()}),
        r"b\.c: stands twice",
    ),
    "two values of one name": (torch_zip({"a": tensor(), "b": {"c": 1}, "b.c": 1}), r"b\.c: stands twice"),
    "no tensors": (torch_zip({"a": 1}), r"is a pickle without tensors"),
    "a single tensor": (torch_zip(tensor()), None),
    "no PyTorch file": (pickled({"a": 1}), r"is a pickle without tensors"),
    "a state that is a number": (torch_zip({"a": With({}, 5)}), r"is a pickle without tensors"),
    "a number": (torch_zip(1), r"is a pickle without tensors"),
}
TENSORS = {
    "beyond its storage": (one(size=(7,), stride=(1,)), r"a: reaches to byte 28 of its storage, which has 24"),
    "an offset beyond": (one(offset=1), r"a: reaches to byte 28 of its storage"),
    "a stride beyond": (one(stride=(4, 1)), r"a: reaches to byte 28 of its storage"),
    "an offset below": (one(offset=-1), r"a: has an offset of -1"),
    "a size below": (one(size=(-2, -3)), r"a: has a size of -2"),
    "a stride below": (one(stride=(3, -1), offset=5), r"a: has a stride of -1"),
    "huge sizes": (one(size=(1 << 40, 1 << 40), stride=(0, 0)), r"a: has shape .* more bytes than a file can have"),
    "huge sizes times nothing": (one(size=(1 << 40, 1 << 40, 0), stride=(0, 0, 0)), r"more bytes than a file can have"),
    "sizes beyond 64 bits": (one(size=(1 << 80,), stride=(0,)), r"a: has a size of 1208925819614629174706176"),
    "a huge offset": (one(offset=1 << 61), r"a: reaches to byte"),
    "one number as 16 TiB": (one(size=(1 << 42,), stride=(0,)), r"as views of a smaller file, expected at most"),
    "small views that add up": (
        torch_zip({f"a{i}": tensor((1 << 22,), (0,)) for i in range(8)}),
        r"a4: and the tensors before it have 83886080 bytes",
    ),
    "overlapping elements": (one(size=(3, 3), stride=(1, 1)), r"a: has elements that overlap"),
    "a size that is a truth": (one(size=(True, 3)), r"a: has a size of a bool"),
    "a size that is a fraction": (one(size=(2.0, 3)), r"a: has a size of a float"),
    "a size that is a list in a list": (one(size=([], 3)), r"a: has a size of a list"),
    "a size that is a number": (one(size=6), r"a: has a size that is none"),
    "too many sizes": (one(size=(1,) * 65, stride=(1,) * 65), r"a: has a size that is none, expected a list of at m"),
    "more sizes than strides": (one(size=(2, 3), stride=(1,)), r"a: has 2 sizes and 1 strides"),
    "no storage": (one(kept=5), r"a: has no storage"),
    "a storage that is not there": (one(kept=storage("7")), r"a: lacks its storage 7"),
    "a path as a storage": (one(kept=storage("../../etc/passwd")), r"a: lacks its storage \.\./"),
    "a storage with a name of a MiB": (one(kept=storage("k" * MIB)), r"has a broken persistent id"),
    "a storage with fewer bytes": (one(kept=storage("0", 5)), r"a: has a storage 0 of 24 bytes, expected 20"),
    "a storage with more bytes": (one(kept=storage("0", 1 << 50)), r"a: has a storage 0 of 24 bytes, expected 45035"),
    "a storage of less than nothing": (one(kept=storage("0", -6)), r"has a broken persistent id"),
    "a storage of 16 EiB": (one(kept=storage("0", 1 << 62)), r"has a broken persistent id"),
    "a storage of two sizes": (
        torch_zip({"a": tensor(), "b": tensor(kept=storage("0", 1))}),
        r"tells two things of storage 0: 6 of F32, 1 of F32",
    ),
    "a storage of two kinds": (
        torch_zip({"a": tensor(), "b": tensor(kept=storage("0", 6, "torch.IntStorage"))}),
        r"tells two things of storage 0: 6 of F32, 6 of I32",
    ),
    "an id of two parts": (one(kept=Kept(("storage", 1))), r"a persistent id of 2 parts"),
    "an id that is a number": (one(kept=Kept(5)), r"asks for something unknown by a persistent id"),
    "an id of nothing": (one(kept=Kept(())), r"asks for something unknown by a persistent id"),
    "a kind of storage that is a dtype": (one(kept=storage("0", 6, "torch.float32")), r"has a broken persistent id"),
    "a kind of storage that is text": (one(kept=Kept(("storage", "x", "0", "cpu", 6))), r"has a broken persistent id"),
    "a dtype that is none": (
        torch_zip({"a": Called("torch._utils._rebuild_tensor_v3", (storage(), 0, (1,), (1,), False, EMPTY, "f"))}),
        r"a: has a dtype that is none",
    ),
    "a dtype wider than the storage": (
        torch_zip(
            {
                "a": Called(
                    "torch._utils._rebuild_tensor_v3",
                    (storage(), 0, (6,), (1,), False, EMPTY, Name("torch.float64")),
                )
            }
        ),
        r"a: reaches to byte 48 of its storage, which has 24",
    ),
    "a view outside": (
        legacy({"a": tensor(kept=storage("0", 6, "torch.FloatStorage", ("1", 4, 3)))}),
        r"not inside it",
    ),
    "a view of nothing": (legacy({"a": tensor(kept=storage("0", 6, "torch.FloatStorage", 5))}), r"not inside it"),
    "a tensor outside its view": (
        legacy({"a": tensor(kept=storage("0", 6, "torch.FloatStorage", ("1", 3, 3)))}),
        r"a: reaches to byte 24 of its storage, which has 12",
    ),
}
GOOD = {"a": tensor()}
COUNT = (6).to_bytes(8, "little")
LEGACY = {
    "another protocol": (legacy(GOOD, protocol=1002), r"is of a protocol that is not 1001"),
    "a protocol that is a list": (legacy(GOOD, protocol=[1001]), r"is of a protocol that is not 1001"),
    "facts without end": (legacy(GOOD, facts=[1] * 1000), r"more than 1000 opcodes"),
    "keys without end": (legacy(GOOD, [1] * 150_000, b""), r"more than 150000 opcodes"),
    "a number that hides opcodes": (b"\x80\x02" + b"N0" * 40 + legacy(GOOD)[2:], r"bytes behind its pickle"),
    "a byte order of two": (legacy(GOOD, facts={"little_endian": 2}), r"does not tell its byte order"),
    "keys that are none": (legacy(GOOD, 5), r"has a list of storages that is none"),
    "keys of numbers": (legacy(GOOD, [0]), r"has a list of storages that is none"),
    "a key that nothing names": (
        legacy(GOOD, ("0", "1"), COUNT + SIX + COUNT + SIX),
        r"has a list of storages that is n",
    ),
    "a key twice": (legacy(GOOD, ("0", "0"), COUNT + SIX + COUNT + SIX), r"has 6 elements in storage 0"),
    "no keys": (legacy(GOOD, (), b""), r"a: lacks its storage 0"),
    "another count": (legacy(GOOD, behind=(7).to_bytes(8, "little") + SIX), r"has 7 elements in storage 0, expected 6"),
    "cut off before a storage": (legacy(GOOD, behind=COUNT[:5]), r"is cut off before storage 0"),
    "cut off in a storage": (legacy(GOOD, behind=COUNT + SIX[:-3]), r"cut off in storage 0: 3 bytes are missing"),
    "something behind": (legacy(GOOD) + b"x", r"1 bytes behind its last storage"),
    "cut off in the second pickle": (legacy(GOOD)[:18], r"is cut off"),
    "something behind one pickle": (pickled({"a": 1}) + b"xx", r"2 bytes behind its pickle"),
}
PKL = Record(b"a/data.pkl", pickled(GOOD))
DATA = Record(b"a/data/0", SIX)
LAST = len(zip_of([PKL])) - 22
BIG = 0xFFFFFFFF


def zipped(*records: Record, end: Mapping[str, Any] | None = None, wide: Mapping[str, Any] | None = None) -> bytes:
    return zip_of([PKL, *(records or (DATA,))], end, wide)


def lying(where: str, **lies: Any) -> bytes:
    return zipped(Record(b"a/data/0", SIX, **{where: lies}))


def wide(*numbers: int, kind: int = 1) -> bytes:
    """The extra field of zip64."""
    return (
        kind.to_bytes(2, "little")
        + (8 * len(numbers)).to_bytes(2, "little")
        + b"".join(number.to_bytes(8, "little") for number in numbers)
    )


ZIPS = {
    "sound": (zipped(), None),
    "sound, with a zip64 end": (zipped(wide={}), None),
    "sound, all told by the zip64 end": (
        zipped(end={"here": 0xFFFF, "count": 0xFFFF, "nbytes": BIG, "begin": BIG}, wide={}),
        None,
    ),
    "sound, sizes by zip64": (
        zipped(
            Record(
                b"a/data/0",
                SIX,
                local={"packed": BIG, "nbytes": BIG, "extra": wide(24, 24)},
                central={"packed": BIG, "nbytes": BIG, "extra": wide(7, kind=9) + wide(24, 24)},
            )
        ),
        None,
    ),
    "sound, sizes behind the data": (
        zipped(Record(b"a/data/0", SIX, flags=8, local={"packed": 0, "nbytes": 0, "crc": 0}, behind=bytes(16))),
        None,
    ),
    "cut off": (zipped()[:-5], r"without its end: it is cut off"),
    "cut off early": (b"PK\x03\x04a/data.pkl"[:15], None),
    "something behind": (zipped() + b"x", r"without its end: it is cut off, or something follows it"),
    "a comment": (zipped(end={"comment": 1, "behind": b"x"}), r"without its end"),
    "something in front": (zip_of([Record(b"a/data.pkl", PKL.data, before=b"PK\x03\x04"), DATA]), r"belong to nothing"),
    "something between": (zipped(Record(b"a/data/0", SIX, before=b"x")), r"a/data/0: has bytes before it that belong"),
    "something before the directory": (
        zipped(Record(b"a/data/0", SIX, behind=b"x")),
        r"directory: has bytes before it",
    ),
    "a descriptor of 17 bytes": (zipped(Record(b"a/data/0", SIX, flags=8, behind=bytes(17))), r"has bytes before it"),
    "two disks": (zipped(end={"disk": 1}), r"is one part of a zip archive in several"),
    "fewer entries than told": (zipped(end={"here": 3, "count": 3}), r"has 2 entries in its zip directory, expected 3"),
    "more entries than told": (zipped(end={"here": 1, "count": 1}), r"bytes behind its zip directory"),
    "a broken entry": (lying("central", magic=b"PK\x01\x03"), r"has a broken entry 1"),
    "an entry on another disk": (lying("central", disk=1), r"has a broken entry 1"),
    "an entry with a comment": (lying("central", comment=b"x"), r"has a broken entry 1"),
    "an entry that is cut off": (lying("central", extra_size=999), r"has a broken entry 1"),
    "a directory elsewhere": (zipped(end={"begin": 5}), r"has a zip directory at 5 .* expected to end at"),
    "a directory of 4 GiB": (
        zipped(end={"nbytes": BIG - 1}),
        r"zip archive of 2 records \(directory: 4294967294 bytes",
    ),
    "a million records": (
        zipped(end={"here": 0xFFFF, "count": 0xFFFF}, wide={"here": 10**6, "count": 10**6}),
        r"is a zip archive of 1000000 records .* at most 40000",
    ),
    "two ends": (zipped(end={"here": 1}, wide={}), r"has two ends that tell different things \(zip64\)"),
    "a zip64 end elsewhere": (zipped(wide={"place": 5}), r"has its zip64 end at 5, expected"),
    "a zip64 end on two disks": (zipped(wide={"disks": 2}), r"has its zip64 end at"),
    "a broken zip64 end": (zipped(wide={"size": 45}), r"has a broken zip64 end"),
    "no zip64 end": (zipped(wide={"magic": b"PK\x06\x05"}), r"has a broken zip64 end"),
    "zip64 that is not there": (zipped(end={"begin": BIG}), r"has a zip directory at 4294967295"),
    "encrypted": (zipped(Record(b"a/data/0", SIX, flags=1)), r"a/data/0: is encrypted"),
    "compressed": (zipped(Record(b"a/data/0", SIX, 8)), r"a/data/0: is compressed \(method 8\).*zip -0"),
    "compressed in secret": (lying("local", method=8), r"local header that tells other things"),
    "two sizes": (lying("central", nbytes=1 << 30), r"a/data/0: has 24 bytes and unpacks to 1073741824"),
    "a longer local size": (
        lying("local", packed=25),
        r"has sizes \[25, 24\] in its local header, 24 in the directory",
    ),
    "another local checksum": (lying("local", crc=1), r"in its local header"),
    "a size of zero without a descriptor": (
        lying("local", packed=0, nbytes=0),
        r"has sizes \[0, 0\] in its local head",
    ),
    "another local name": (lying("local", name=b"a/data/1"), r"a/data/0: has another name in its local header"),
    "a longer local name": (lying("local", name=b"a/data/01"), r"a/data/0: has another name in its local header"),
    "another local magic": (lying("local", magic=b"PK\x03\x05"), r"a/data/0: has another name in its local header"),
    "other local flags": (lying("local", flags=8), r"local header that tells other things"),
    "a local extra field beyond": (lying("local", extra_size=60_000), r"local header that tells other things"),
    "a record in the directory": (lying("central", packed=1000, nbytes=1000, offset=0), r"has bytes before|overlaps"),
    "a record beyond the file": (lying("central", packed=1000, nbytes=1000), r"a/data/0: has sizes|ends at byte"),
    "an entry beyond the file": (lying("central", offset=1 << 31), r"a/data/0: has bytes before it"),
    "an entry at the end": (
        zip_of([PKL, Record(b"a/data/0", b"", central={"offset": LAST})], {}),
        r"a/data/0: ",
    ),
    "records over one another": (
        zip_of([PKL, DATA, Record(b"a/data/1", SIX, central={"offset": len(zip_of([PKL])) - 22 - 56})]),
        r"a/data/1: |a/data/0: ",
    ),
    "a record beyond the directory": (
        zipped(Record(b"a/data/0", SIX, local={"packed": 999, "nbytes": 999}, central={"packed": 999, "nbytes": 999})),
        r"a/data/0: ends at byte \d+, behind the last record's end",
    ),
    "an entry without a record": (
        zipped(DATA, Record(b"a/data/1", b"", ghost=True)),
        r"a/data/1: begins at byte .*, in",
    ),
    "no record at all": (b"PK\x03\x04" + zip_of([], {"begin": 4}), None),
    "a name twice": (zipped(DATA, DATA), r"a/data/0: stands twice in the zip archive"),
    "a name that is no text": (zipped(DATA, Record(b"a/\xff", b"")), r"which is not UTF-8"),
    "zip64 sizes that are missing": (lying("central", packed=BIG), r"has 0 sizes in its zip64 field, expected 1"),
    "zip64 sizes too many": (lying("central", extra=wide(1)), r"has 1 sizes in its zip64 field, expected 0"),
    "zip64 sizes that lie": (
        zipped(Record(b"a/data/0", SIX, central={"packed": BIG, "nbytes": BIG, "extra": wide(1 << 60, 1 << 60)})),
        r"in its local header|ends at byte",
    ),
    "zip64 sizes of two kinds": (
        lying("central", nbytes=BIG, extra=wide(1 << 60)),
        r"and unpacks to 1152921504606846976",
    ),
    "zip64 twice": (lying("central", packed=BIG, nbytes=BIG, extra=wide(24, 24) * 2), r"has a broken zip64 field"),
    "zip64 cut off": (lying("central", extra=wide(24)[:-1]), r"has an extra field that is cut off"),
    "zip64 of half a number": (lying("central", extra=b"\1\0\4\0abcd"), r"has a broken zip64 field"),
    "local zip64 that lies": (
        lying("local", packed=BIG, nbytes=BIG, extra=wide(25, 24)),
        r"has sizes \[25, 24\] in its local header",
    ),
    "two pickles": (zipped(DATA, Record(b"b/data.pkl", b"N.")), r"is a zip archive with 2 data\.pkl, expected one"),
    "a pickle deeper down": (zip_of([Record(b"a/b/data.pkl", b"N.")]), r"is a zip archive with 0 data\.pkl"),
    "a byte order of its own": (torch_zip(GOOD, byteorder=b"middle"), r"has byte order b'middle'"),
    "a byte order of a GiB": (torch_zip(GOOD, byteorder=b"x" * 999), r"has byte order b'xxxxxxxxxxxxxxxx'"),
    "TorchScript": (torch_zip(GOOD, **{"a/constants.pkl": b"N."}), r"is a TorchScript program"),
    "TorchScript code": (torch_zip(GOOD, **{"a/code/x.py": b""}), r"is a TorchScript program"),
}
GROUPS = {"asks": ASKS, "calls": CALLS, "bombs": BOMBS, "broken": BROKEN, "tensors": TENSORS, "legacy": LEGACY}
GROUPS["zips"] = ZIPS
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}

READER = """
import json, re, resource, sys, time, traceback
from loratool.core.errors import FormatError
from loratool.files.pickles import read_pickle
import encodings.raw_unicode_escape, encodings.latin_1  # codecs that are imported when they are first used
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
names = sys.argv[1:]
seen, results = [], {}
def hook(event, arguments):
    if event == "open" and arguments and arguments[0] in names:
        return
    if event == "builtins.id":
        return
    seen.append((event, str(arguments)[:200]))
before = set(sys.modules)
sys.addaudithook(hook)
for name in names:
    del seen[:]
    started = time.process_time()
    try:
        found = read_pickle(name)
        for one in found.tensors.values():
            one.read()
        told = None
    except FormatError as error:
        told = str(error)
    except BaseException as error:
        told = "NOT OURS: " + traceback.format_exc()
    took, events = time.process_time() - started, list(seen)
    results[name] = [told, took, events, sorted(set(sys.modules) - before)]
# Not ru_maxrss: that begins with what the parent had.
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) >> 10
print(json.dumps([results, peak]))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int]:
    """The folder in which the reader ran, what it said of each case, and its peak of memory in MiB."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, (data, _) in enumerate(CASES.values()):
        (folder / str(number)).write_bytes(data)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, range(len(CASES)))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
    )
    results, peak = json.loads(done.stdout)
    return folder, results, peak


@pytest.mark.parametrize(("number", "name"), list(enumerate(CASES)), ids=list(CASES))
def test_hostile(outcome: tuple[Path, dict[str, Any], int], number: int, name: str) -> None:
    folder, results, _ = outcome
    told, seconds, events, modules = results[str(number)]
    expected = CASES[name][1]
    if expected is None:
        assert told is None or "NOT OURS" not in told, told
    else:
        assert told is not None and re.search(expected, told), told
        assert told.startswith(f"{number}: ") and told.isprintable() and len(told) < 1000
    assert events == [] and modules == []
    assert seconds < 2
    assert not (folder / SENTINEL).exists()


def test_every_case_gives_the_same_error_here(tmp_path: Path, outcome: tuple[Path, dict[str, Any], int]) -> None:
    for number, (data, _) in enumerate(CASES.values()):
        (tmp_path / "x").write_bytes(data)
        try:
            found = read_pickle(tmp_path / "x")
        except FormatError as error:
            told = str(error).removeprefix(str(tmp_path / "x"))
            assert told == outcome[1][str(number)][0].removeprefix(str(number))
        else:
            assert outcome[1][str(number)][0] is None
            assert all(len(one.read()) == one.nbytes for one in found.tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(outcome: tuple[Path, dict[str, Any], int]) -> None:
    assert outcome[2] < 200


def test_the_same_files_do_harm_where_they_are_trusted(tmp_path: Path) -> None:
    """The sentinel works: Python's own reader runs what it finds."""
    code = pickled(Called("os.system", (f"cd {tmp_path} && {TOUCH}",)))
    pickle.loads(code)
    assert (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("name", [name for name, (_, expected) in ZIPS.items() if name.startswith("sound")])
def test_sound_archives_are_read(outcome: tuple[Path, dict[str, Any], int], name: str) -> None:
    number = list(CASES).index(f"zips: {name}")
    assert outcome[1][str(number)][0] is None


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    for whole in (torch_zip(GOOD), legacy(GOOD)):
        for length in range(4, len(whole)):
            (tmp_path / "x").write_bytes(whole[:length])
            with pytest.raises(FormatError):
                read_pickle(tmp_path / "x")
