"""Every hostile header of the list, read in this process by both readers: the one that finds, the one that refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.core.errors import FormatError
from loratool.files.look import look
from loratool.files.safetensors import read_header
from tests.hostile.cases import CONTAINER


@pytest.mark.parametrize("case", CONTAINER, ids=lambda case: case.name)
def test_both_readers_agree(tmp_path: Path, case: object) -> None:
    """What `look` calls sound is read, and what has faults is refused, in one line and with the file's name."""
    path = case.put(tmp_path / "style.safetensors")  # type: ignore[attr-defined]
    found = look(str(path))
    try:
        header = read_header(path)
    except FormatError as error:
        assert not found.sound
        assert error.file == str(path) and "\n" not in str(error)
        return
    assert found.sound and header.tensors.keys() == found.tensors.keys()
    assert header.metadata == dict(found.metadata)
