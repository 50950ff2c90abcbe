"""The header reader on what neither the hostile files nor the fuzzing reach: each fault, its code and its byte."""

from __future__ import annotations

import pytest

from loratool.files import header
from loratool.files.header import LENGTH, Scan, scan


def codes(raw: bytes, data: int | None = None) -> list[tuple[str, int]]:
    """Code and byte (in the header) of each fault."""
    return [(fault.code, fault.byte - LENGTH) for fault in scan(raw, data).faults]


@pytest.mark.parametrize(
    ("raw", "code", "at", "words"),
    [
        (b"[]", "not-json", 0, "the header is not a JSON object, found '['"),
        (b"", "not-json", 0, "found its end"),
        (b'{"a" "b"}', "not-json", 5, "a colon is expected"),
        (b'{"a":[1;2]}', "not-json", 7, "a comma or the end of the list"),
        # A letter is no fault of the text's, wherever the four bytes end that are looked at.
        ("{é€}".encode(), "not-json", 1, r"a name in quotes is expected, found '\xc3'"),
        (b"{\xe2\x82", "not-json", 1, r"a name in quotes is expected, found '\xe2'"),
        (b"{\x82}", "not-utf8", 1, "not UTF-8 text (byte 9)"),
    ],
)
def test_where_it_ends_to_be_json(raw: bytes, code: str, at: int, words: str) -> None:
    found = scan(raw, 0)
    assert codes(raw, 0) == [(code, at)]
    assert found.first is not None and words in found.first.message
    assert not found.entries


ONE = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
TWO = b'{"dtype":"U8","shape":[1],"data_offsets":[1,2]}'


def test_a_tensor_called_metadata_is_no_tensor() -> None:
    """Spelled like one, and with others behind it: it is metadata that is no text."""
    found = scan(b'{"__metadata__":' + ONE + b',"a":' + ONE + b"}", 1)
    assert list(found.entries) == ["a"]
    # The text among the three is kept.
    assert found.metadata == {"dtype": "U8", "shape": "", "data_offsets": ""}
    assert [fault.code for fault in found.faults] == ["metadata-not-text"] * 2


@pytest.mark.parametrize("ends", [b',"z":"3"}', b"}"], ids=["others follow", "last"])
def test_metadata_that_stand_twice_keep_the_first(ends: bytes) -> None:
    """However the second is read: at once where another follows, else step by step."""
    raw = b'{"__metadata__":{"k":"1","k":"2"' + ends + b"}"
    found = scan(raw, 0)
    assert found.metadata["k"] == "1"
    assert codes(raw, 0) == [("duplicate-field", raw.index(b'"k":"2"'))]
    assert found.first is not None and found.first.key == "k"


@pytest.mark.parametrize("blank", [b"", b" ", b"\n  "])
def test_blanks_between_members_change_nothing(blank: bytes) -> None:
    """Of tensors, of metadata, and behind the comma that the quick way stops at."""
    pairs = (b"," + blank).join([b'"k":"1"', b'"l":"2"', b'"m":"3"'])
    raw = b'{"__metadata__":{' + pairs + b"}," + blank + b'"a":' + ONE + b"," + blank + b'"b":' + TWO + b"}"
    found = scan(raw, 2)
    assert not found.faults
    assert found.metadata == {"k": "1", "l": "2", "m": "3"}
    assert found.entries["a"].byte == LENGTH + raw.index(b'"a"')
    assert [(one.start, one.stop) for one in found.entries.values()] == [(0, 1), (1, 2)]


@pytest.mark.parametrize("ends", [b',"z":' + ONE + b"}", b"}"], ids=["others follow", "last"])
def test_a_dtype_that_nobody_knows_is_named(ends: bytes) -> None:
    found = scan(b'{"a":' + ONE.replace(b"U8", b"F33") + ends, None)
    assert "a" not in found.entries
    assert [(fault.code, fault.key) for fault in found.faults] == [("bad-dtype", "a")]
    assert "has dtype 'F33', expected one of" in found.faults[0].message


@pytest.mark.parametrize(
    "raw",
    [b'{"a\xff":' + ONE + b',"z":' + TWO + b"}", b'{"__metadata__":{"k\xff":"1","z":"2"}}'],
    ids=["a tensor's", "metadata's"],
)
def test_a_name_that_is_no_text_among_others(raw: bytes) -> None:
    """Where the others could be read at once."""
    found = scan(raw, 2)
    assert found.first is not None and found.first.code == "not-utf8"
    assert found.first.byte - LENGTH == raw.index(b"\xff")


def test_more_spellings_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_SPELLED", 2)
    ends = [1, 3, 6, 10, 11, 13]
    parts, begin = [], 0
    for end in ends:
        parts.append(f'"{end}":{{"dtype":"U8","shape":[{end - begin}],"data_offsets":[{begin},{end}]}}')
        begin = end
    found = scan(f"{{{','.join(parts)}}}".encode(), 13)
    assert not found.faults
    assert [(entry.shape, entry.stop) for entry in found.entries.values()] == [
        ((size,), end) for size, end in zip([1, 2, 3, 4, 1, 2], ends, strict=True)
    ]


def test_a_text_of_many_escapes_is_read_in_steps() -> None:
    """More escapes than one step takes."""
    text = '\\"' * 2500
    assert scan(b'{"__metadata__":{"k":"' + text.encode() + b'"}}', 0).metadata == {"k": '"' * 2500}


def test_where_nothing_is_wrong_there_is_no_first() -> None:
    assert Scan().first is None
    found = scan(b'{"a":' + ONE + b"}", 1)
    assert found.first is None and found.entries["a"].shape == (1,)
