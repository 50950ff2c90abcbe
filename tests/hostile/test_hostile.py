"""Every hostile file and folder, through `info` and `validate` as processes under limits of time and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loratool
from loratool.core.registry import checks
from tests.hostile.bytes import file, lora
from tests.hostile.cases import FILES, Case
from tests.hostile.make_findings import WITHOUT_CASE
from tests.hostile.places import PLACES, SHARDS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

ROOT = Path(loratool.__file__).parents[1]
CASES = [*FILES, *PLACES]
MEGABYTE = 1_000_000
MEMORY = {"info": 150 * MEGABYTE, "validate": 400 * MEGABYTE}
CPU = {"info": 1.0, "validate": 20.0}
"""Seconds of the processor, which is 1 s on the clock where nobody else runs. `validate` has no promise but to end."""

PRINTED = 64 * 1024
KIND = re.compile(r"^  (error|warning|note): ([a-z0-9-]+)$", re.MULTILINE)
INERT = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
CODES = {code.id: code for check in checks().values() for code in check.codes.values()}

Run = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command line in a process of its own."""
    clean = tmp_path_factory.mktemp("warm") / "clean.safetensors"
    clean.write_bytes(file(lora()))
    command = [sys.executable, "-m", "tests.hostile.warm", str(clean)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def ask(words: list[str]) -> dict[str, Any]:
            stdin.write(json.dumps(words) + "\n")
            stdin.flush()
            answer: dict[str, Any] = json.loads(stdout.readline())
            return answer

        yield ask
        stdin.close()


def check_limits(command: str, done: dict[str, Any]) -> None:
    """Whatever the file: a plain end, no traceback, nothing that acts on a terminal, and within the limits."""
    assert done["code"] in (0, 1), done
    assert "Traceback" not in done["out"] + done["err"], done["err"]
    assert len(done["out"].encode()) <= PRINTED
    assert len(done["err"].encode()) <= PRINTED
    assert not INERT.search(done["out"] + done["err"])
    assert done["cpu"] <= CPU[command], f"{command} took {done['cpu']:.1f} s"
    assert done["memory"] <= MEMORY[command], f"{command} took {done['memory'] / MEGABYTE:.0f} MB"
    assert not done["loaded"] or "GGUF" in done["err"]  # llama.cpp's own reader brings numpy


def check_found(case: Case, done: dict[str, Any]) -> None:
    """`validate` told what the case asks for, and no more where nothing is wrong."""
    told = {code: severity for severity, code in KIND.findall(done["out"])}
    wanted = set(case.found.split())
    assert wanted <= told.keys(), f"{sorted(wanted - told.keys())} is missing from {done['out']}"
    assert wanted or not told, done["out"]
    assert done["code"] == ("error" in told.values())
    assert all(CODES[code] for code in told)
    assert not done["err"]


def check_said(case: Case, done: dict[str, Any]) -> None:
    """`info` read the file, or said in one line why not."""
    if case.says is None:
        return
    if not case.says:
        assert done["code"] == 0, done["err"]
        return
    assert done["code"] == 1
    assert case.says in done["err"]
    assert done["err"].startswith("error: ") and done["err"].count("\n") == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile(tmp_path: Path, run: Run, case: Case) -> None:
    place = case.put(tmp_path / "style.safetensors") if not case.place else case.put(tmp_path / "style")
    before = sorted(tmp_path.rglob("*")) if not place.is_symlink() else []
    told = run(["validate", str(place)])
    said = run(["info", str(place)])
    check_limits("validate", told)
    check_limits("info", said)
    check_found(case, told)
    check_said(case, said)
    # What `info` refuses, `validate` calls an error; but for checkpoints, and what is too much to show.
    assert said["code"] <= told["code"] or "are shown" in said["err"] or case in SHARDS
    assert not before or sorted(tmp_path.rglob("*")) == before  # nothing was written


SAMPLE = ["a loop of links", "a pipe", "/dev/zero", "2.4 GB of nothing", "20 MB of metadata", "20 nested + as alpha",
          "weights a pipe", "shard /dev/zero", "deep list", "NaN in LoKr", "html", "ANSI as a key"]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_hostile_as_a_process_of_its_own(tmp_path: Path, name: str) -> None:
    """As a user starts it: the limits hold with the start of Python in them."""
    case = next(case for case in CASES if case.name == name)
    place = case.put(tmp_path / "style.safetensors") if not case.place else case.put(tmp_path / "style")
    for command in ("info", "validate"):
        code = "from loratool.cli.main import app; app()"
        out, err = (tmp_path / f"{command}.{end}" for end in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            words = [sys.executable, "-c", code, command, str(place)]
            process = subprocess.Popen(words, stdout=stdout, stderr=stderr, cwd=ROOT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        done = {"code": process.returncode, "out": out.read_text(), "err": err.read_text()}
        usage = {"cpu": 0.0, "memory": 0, "loaded": ""}
        check_limits(command, {**done, **usage})
        (check_said if command == "info" else check_found)(case, done)


def test_every_code_has_a_case() -> None:
    found = {code for case in CASES for code in case.found.split()}
    assert set(CODES) - found == WITHOUT_CASE.keys() - found
    assert found <= CODES.keys()


def test_there_are_many_cases_and_clean_ones() -> None:
    assert len(CASES) > 400
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(not case.found for case in CASES) >= 15


def test_names_from_files_are_no_paths(tmp_path: Path, run: Run) -> None:
    """A link that is read is followed by the system only, and what it leads to is not written to."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret words that nobody may see")
    os.symlink(secret, tmp_path / "x.safetensors")
    done = run(["validate", str(tmp_path / "x.safetensors")])
    assert "plain text" in done["out"]
    assert "nobody" not in done["out"]
