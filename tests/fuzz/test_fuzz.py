"""Readers of what strangers send, under mutated files. `make fuzz` runs many more cases than `make test`."""

from __future__ import annotations

import io
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from loratool.core.errors import LoratoolError
from loratool.files.pickles import read_pickle
from loratool.files.safetensors import read_header
from tests.files.test_pickles import check
from tests.fuzz import targets
from tests.fuzz.mutate import changed_json, mutated, programs
from tests.fuzz.targets import TARGETS, _home, header, pickles, seeds

CASES = int(os.environ.get("LORATOOL_FUZZ", "0"))
"""Cases of each test; 0 for the quick run."""


def cases(quick: int) -> settings:
    """So many in `make test`. Not the same ones in each long run."""
    return settings(
        max_examples=CASES or quick,
        deadline=None,
        derandomize=not CASES,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


@cases(200)
@given(st.data())
def test_headers(data: st.DataObject) -> None:
    header(data.draw(mutated(seeds("header"))))


@cases(300)
@given(st.data())
def test_pytorch_files(data: st.DataObject) -> None:
    pickles(data.draw(mutated(seeds("pickles"))))


@cases(300)
@given(programs())
def test_rows_of_opcodes(data: bytes) -> None:
    pickles(data)


@pytest.mark.parametrize("target", ["config", "index", "recipes"])
def test_json(target: str) -> None:
    @cases(60)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        known = seeds(target)
        TARGETS[target](data.draw(st.one_of(changed_json(known), mutated(known))))

    run()


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_themselves_are_accepted(target: str) -> None:
    for one in seeds(target):
        TARGETS[target](one)
    assert targets.TALLIES[target].accepted


# ---------------------------------------------------------------- what torch.save writes, torch.load and we read alike

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def saved(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A nested dict of views of a few storages, and options of torch.save."""
    bases = [
        torch.arange(60).to(draw(st.sampled_from(DTYPES))).reshape(3, 4, 5) for _ in range(draw(st.integers(1, 3)))
    ]
    made: dict[str, Any] = {}
    for number in range(draw(st.integers(1, 6))):
        one = draw(st.sampled_from(bases))
        for _ in range(draw(st.integers(0, 3))):
            if one.dim() and draw(st.booleans()):
                dimension = draw(st.integers(0, one.dim() - 1))
                start, step = draw(st.integers(0, one.shape[dimension])), draw(st.integers(1, 3))
                index = [slice(None)] * one.dim()
                index[dimension] = slice(start, None, step)
                one = one[tuple(index)]
            elif one.dim() > 1:
                one = one.transpose(0, draw(st.integers(0, one.dim() - 1)))
        made[f"k{number}"] = {"in": one} if draw(st.booleans()) else one
    options: dict[str, Any] = {"pickle_protocol": draw(st.integers(2, 5))}
    if draw(st.booleans()):
        options["_use_new_zipfile_serialization"] = False
    return made, options


@cases(100)
@given(saved())
def test_views_as_torch_loads_them(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    made, options = case
    file = io.BytesIO()
    torch.save(made, file, **options)
    (_home() / "x.pt").write_bytes(file.getvalue())
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)  # of our own making
    flat = {}
    for key, one in loaded.items():
        flat |= {f"{key}.{name}": inner for name, inner in one.items()} if isinstance(one, dict) else {key: one}
    check(read_pickle(_home() / "x.pt").tensors, flat)


# ---------------------------------------------------------------- the net itself


def opens_elsewhere() -> bool:
    Path("/proc/self/status").read_bytes()
    return True


def imports() -> bool:
    import this_is_not_there  # type: ignore[import-not-found]

    return bool(this_is_not_there)


def loops() -> bool:
    started = time.process_time()
    while time.process_time() < started + 0.2:
        pass
    return True


def refuses_without_a_word() -> bool:
    raise LoratoolError("")


def trips() -> bool:
    return bool({}["a"])


def runs() -> bool:
    return bool(pickle.loads(b"cos\ngetpid\n)R."))


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (opens_elsewhere, AssertionError),
        (imports, (AssertionError, ImportError)),
        (loops, AssertionError),
        (refuses_without_a_word, AssertionError),
        (trips, KeyError),
        (runs, AssertionError),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_no_file_may_do_is_noticed(work: Any, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "SECONDS", 0.1)
    with pytest.raises(error):
        targets._case("net", _home(), work, strict=True)


def test_a_laxer_reader_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if our reader took a file that the library rejects."""
    (_home() / "sound.safetensors").write_bytes(seeds("header")[-1])
    sound = read_header(_home() / "sound.safetensors")
    monkeypatch.setattr(targets, "read_header", lambda path: sound)
    with pytest.raises(Exception, match=r"(?i)header|invalid|deserializ"):
        header(b'\x08\0\0\0\0\0\0\0{"a":1} ')
