"""The names that a PyTorch file may say, and what they mean here. Nothing of PyTorch is imported.

This is the allow-list: any other name is an error. What stands for a tensor is the arguments of its call, unchecked:
`pickles` checks them, with the key to name in an error, before anything is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from loratool.core.errors import FormatError
from loratool.core.tensor import DTYPES, code_named
from loratool.files.unpickle import Global, Meanings, Table

_DAMAGED = "the file is damaged or was made to do harm"


@dataclass(frozen=True, eq=False)
class Storage:
    """Memory that tensors share: `numel` elements of `dtype`, kept under `key`. `view` is first element and number of
    elements, where it is a part of the storage that is kept (files of 2017)."""

    key: str
    dtype: str
    numel: int
    view: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, all parts."""
        return self.numel * item_size(self.dtype)


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A tensor as the file tells it; nothing is checked. `dtype` None: the storage's. `odd`: hooks or flags on it."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any = None
    odd: tuple[Any, ...] = ()


@dataclass(eq=False)
class NumberType:
    """numpy's dtype of a single number."""

    code: Any
    state: Any = None


def item_size(dtype: str) -> int:
    """Bytes per element of a dtype that safetensors knows, by its code."""
    return DTYPES[dtype] // 8


def meanings(storages: dict[str, Storage]) -> Meanings:
    """The allow-list, for one file. Puts every storage of which the file tells into `storages`, by its key."""

    def persistent(told: Any) -> Storage:
        found = _storage(told)
        known = storages.setdefault(found.key, found)
        if (known.dtype, known.numel) != (found.dtype, found.numel):
            raise FormatError(
                f"tells two things of storage {found.key}: {known.numel} of {known.dtype}, "
                f"{found.numel} of {found.dtype}",
                hint=_DAMAGED,
            )
        return found

    return Meanings(NAMES, REFUSED, persistent, (Table, NumberType))


def _storage(told: Any) -> Storage:
    """The storage of a persistent id: `("storage", type, key, location, numel[, view])`. The location is nothing."""
    if type(told) is not tuple or not told or told[0] != "storage":
        what = told[0][:80] if type(told) is tuple and told and type(told[0]) is str else "something unknown"
        raise FormatError(f"asks for {what} by a persistent id, expected a storage", hint=_DAMAGED)
    if len(told) not in (5, 6):
        raise FormatError(f"has a persistent id of {len(told)} parts, expected 5", hint=_DAMAGED)
    kind, key, numel = told[1], told[2], told[4]
    dtype = STORAGES.get(kind.name) if type(kind) is Global else None
    if dtype is None or type(key) is not str or len(key) > 256 or type(numel) is not int or not 0 <= numel < 1 << 60:
        raise FormatError("has a broken persistent id: expected a kind of storage, a key, a size", hint=_DAMAGED)
    view = told[5] if len(told) == 6 and told[5] is not None else (key, 0, numel)
    first, count = view[1:] if type(view) is tuple and len(view) == 3 else (None, None)
    if type(first) is not int or type(count) is not int or first < 0 or count < 0 or first + count > numel:
        raise FormatError(f"has a view of storage {key} that is not inside it", hint=_DAMAGED)
    return Storage(key, dtype, numel, (first, count))


def _ordered(pairs: Any = ()) -> Table:
    """`OrderedDict()`, or of a list of pairs, as Python 2 spelled it."""
    if type(pairs) is tuple and not pairs:
        return Table()
    if type(pairs) is not list or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
        raise FormatError("has an OrderedDict of what is no list of pairs", hint=_DAMAGED)
    return Table([(key, value) for key, value in pairs])


def _first_version(storage: Any, offset: Any, size: Any, stride: Any) -> Rebuilt:
    return Rebuilt(storage, offset, size, stride)


def _second_version(
    storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, flags: Any = None
) -> Rebuilt:
    return Rebuilt(storage, offset, size, stride, None, (hooks, flags))


def _third_version(
    storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, dtype: Any, flags: Any = None
) -> Rebuilt:
    return Rebuilt(storage, offset, size, stride, dtype, (hooks, flags))


def _parameter(data: Any, gradient: Any, hooks: Any) -> Any:
    if type(data) is not Rebuilt:
        raise FormatError("has a parameter that is no tensor", hint=_DAMAGED)
    return Rebuilt(data.storage, data.offset, data.size, data.stride, data.dtype, (*data.odd, hooks))


def _size(sizes: Any = ()) -> Any:
    return sizes


def _device(*told: Any) -> str:
    return ":".join(str(part) for part in told if type(part) in (str, int))


def _bytes(text: Any, encoding: Any) -> bytes:
    """Bytes, as pickles before protocol 3 spell them."""
    if type(text) is not str or encoding != "latin1" or any(ord(letter) > 0xFF for letter in text):
        raise FormatError("has bytes that are spelled in an unknown way", hint=_DAMAGED)
    return text.encode("latin-1")


def _number_type(code: Any, align: Any = False, copy: Any = False) -> NumberType:
    return NumberType(code)


def _number(kind: Any, data: Any) -> float | int | bool:
    """A numpy scalar as a number of Python; exact."""
    code = kind.code if type(kind) is NumberType and type(kind.code) is str else ""
    order = kind.state[1] if code and type(kind.state) is tuple and len(kind.state) > 1 else "<"
    spelling = _NUMBERS.get(code.lstrip("<>|="))
    if spelling is None or type(data) is not bytes or struct.calcsize(spelling) != len(data):
        raise FormatError("has a numpy number of an unknown kind", hint=_DAMAGED)
    found: float | int | bool = struct.unpack((">" if order == ">" else "<") + spelling, data)[0]
    return found


_FLOATS = {"f8": "d", "f4": "f", "f2": "e", "b1": "?"}
_INTEGERS = {"i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B"}
_NUMBERS = _FLOATS | _INTEGERS
_DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
TORCH_DTYPES = {f"torch.{name}": code for name in _DTYPE_NAMES if (code := code_named(name)) is not None}
"""PyTorch's dtypes that safetensors has, by their global -> safetensors' code."""

_STORED_FLOATS = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "ComplexFloat": "C64"}
_STORED_INTEGERS = {"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}
_STORED = _STORED_FLOATS | _STORED_INTEGERS
STORAGES = {f"torch.{name}Storage": code for name, code in _STORED.items()} | {"torch.storage.UntypedStorage": "U8"}
"""Kinds of storages by their global -> safetensors' code of their elements."""

NAMES = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _first_version,
    "torch._utils._rebuild_tensor_v2": _second_version,
    "torch._utils._rebuild_tensor_v3": _third_version,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _bytes,
    "numpy.dtype": _number_type,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    # A class that checkpoints of Stable Diffusion name as the key of a dict. It is never called.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": None,
    **dict.fromkeys(STORAGES),
    **dict.fromkeys(TORCH_DTYPES),
}
"""The allow-list: global -> what a call of it means, None for names that are never called."""

REFUSED = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse": "a sparse tensor",
    "torch._utils._rebuild_nested": "a nested tensor",
    "torch._utils._rebuild_meta": "a tensor without values",
    "torch._utils._rebuild_": "an unusual kind of tensor",
    "torch._tensor._rebuild_": "a tensor with attributes, or of a class of its own",
    "torch.QInt": "quantised numbers",
    "torch.QUInt": "quantised numbers",
    "torch.ComplexDoubleStorage": "complex128 numbers, which safetensors does not have",
    "torch.complex": "numbers that safetensors does not have",
    "torch.float4": "numbers of 4 bits, two in a byte",
    "torch.bits": "bits without a meaning",
    "torch.storage._load_from_bytes": "a tensor that was pickled without torch.save",
    "numpy.core.multiarray._reconstruct": "a numpy array",
    "numpy._core.multiarray._reconstruct": "a numpy array",
    "torch.nn.modules.": "a whole module, which is code",
    "argparse.Namespace": "settings of a program",
    "omegaconf.": "settings of a program",
}
"""Names that honest files say, too, by their beginning, with a word for the message. They are refused all the same."""
