"""Strategies: sound files, changed a little, and programs for the pickle machine put together from opcodes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.pickles import legacy, spelled, storage, tensor, torch_zip

INTERESTING = [
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    65535,
    65536,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
    (1 << 64) - 1,
]
FRAGMENTS = [
    *(b"", b"{", b"}", b"[", b"]", b'"', b",", b":", b"-1", b"1e999", b"NaN", b"null", b"true", b"\\ud800", b"9" * 30),
    *(
        b'"dtype"',
        b'"F32"',
        b'"shape"',
        b'"data_offsets"',
        b'"__metadata__"',
        b'"weight_map"',
        b'"../x"',
        b'"/dev/zero"',
    ),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"\x80\x02", b"\x80\x04", b"."),
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"R",
        b"Q",
        b"b",
        b"(",
        b"t",
        b"u",
    ),
]


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """One of the seeds with up to five changes: bits, bytes, numbers, fragments, parts of others."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.sampled_from([0, 1, 1, 2, 4, 8, 16, 100]))
        kind = draw(st.integers(0, 6))
        if kind == 0 and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            data[at : at + size] = draw(st.binary(max_size=9))
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size] * draw(st.integers(1, 3))
        elif kind == 4:
            width = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(INTERESTING)) % (1 << 8 * width)
            data[at : at + width] = number.to_bytes(width, draw(st.sampled_from(["little", "big"])))
        elif kind == 5:
            data[at : at + size] = draw(st.sampled_from(FRAGMENTS))
        else:
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, len(other)))
            data[at:] = other[start:]
    return bytes(data)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([*INTERESTING, -1, -(1 << 70), 0.5, -0.0, 1e308, float("inf"), float("nan")]),
    st.sampled_from(
        ["", "x", "../x", "/etc/passwd", "a.safetensors", "\x1b[31m", "\u202e", "\ud800", "9" * 99, "(a|b)*", "["]
    ),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        found += _places(one, (*path, key))
    return found


@st.composite
def changed_json(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """One of the seeds, which are JSON, with up to three values replaced, removed or added."""
    value = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        inside = value
        for key in way:
            inside = inside[key]
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del inside[last]
        elif kind == 1 and isinstance(inside, dict):
            inside[draw(st.text(max_size=6))] = inside.pop(last)
        else:
            inside[last] = draw(VALUES)
    return json.dumps(value).encode("utf-8", "surrogatepass")


GLOBALS = [
    *("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size"),
    *("torch.FloatStorage", "torch.float32", "torch.device", "_codecs.encode", "numpy.dtype"),
    *("numpy.core.multiarray.scalar", "os.system", "builtins.eval", "torch.storage.UntypedStorage"),
]
OPCODES = [
    *(b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"0", b"1", b"2", b"t", b"\x85", b"\x86", b"\x87", b"l", b"d"),
    *(
        b"a",
        b"e",
        b"s",
        b"u",
        b"R",
        b"b",
        b"Q",
        b"\x81",
        b"\x93",
        b"\x94",
        b"h\0",
        b"h\1",
        b"q\1",
        b"j\0\0\0\0",
        b"\x8f",
    ),
    *(
        b"\x8f",
        b"\x90",
        b"\x91",
        b"K\0",
        b"K\6",
        b"M\0\1",
        b"J\xff\xff\xff\xff",
        b"G" + bytes(8),
        b"X\1\0\0\0a",
        b"\x8c\1b",
    ),
    *(b"C\1c", b"I1\n", b"I01\n", b"L5L\n", b"F1.5\n", b"Vx\n", b"\x8a\1\5", b"\x95" + bytes(8), b"\x80\4"),
    *(b"c" + name.rpartition(".")[0].encode() + b"\n" + name.rpartition(".")[2].encode() + b"\n" for name in GLOBALS),
    *(spelled(one) for one in (tensor(), storage(), tensor((3,), (2,), 1), tensor((2, 2), (0, 1)), "0", ("a", 1))),
]


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """A PyTorch file whose pickle is a row of random opcodes, in either container."""
    code = b"".join(draw(st.lists(st.one_of(st.sampled_from(OPCODES), st.binary(max_size=2)), max_size=40)))
    if draw(st.booleans()):  # so that more than errors about the stack are met: an entry of a dict that has a tensor
        code = b"}X\1\0\0\0t" + spelled(tensor()) + b"sX\1\0\0\0v" + code + b"s"
    whole = b"\x80\2" + code + b"."
    if draw(st.booleans()):
        return torch_zip(whole)
    sound = legacy({"a": tensor()})
    return sound.replace(b"\x80\2" + spelled({"a": tensor()}) + b".", whole)
