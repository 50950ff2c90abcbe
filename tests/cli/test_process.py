"""The process: streams that are closed, full or broken, and signals, as real processes `python -m loratool`."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.builders import zero_file
from tests.hostile.bytes import file, lora

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shells, signals and devices of POSIX")

LORATOOL = [sys.executable, "-m", "loratool"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("process") / "style.safetensors"
    path.write_bytes(file(lora()))
    return path


def run(*words: str, after: str = "", before: str = "") -> subprocess.CompletedProcess[str]:
    """A command line of a shell: `before` loratool, `after` it."""
    line = f"{before} {shlex.join([*LORATOOL, *words])} {after}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)


# Each with `{}` for a file: a report, JSON, a command that prints by itself, and what the parser prints.
LINES = ("info {}", "info --json {}", "blocks {}", "--version", "--help")


@pytest.fixture(params=LINES)
def words(request: pytest.FixtureRequest, style: Path) -> list[str]:
    return [str(style) if word == "{}" else word for word in request.param.split()]


# -- streams


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"], ids=["stdout", "all"])
def test_closed_streams_are_no_error(words: list[str], closed: str) -> None:
    done = run(*words, after=closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_printed_gets_into_no_file(style: Path, tmp_path: Path) -> None:
    """The first file that is opened does not get the number of a stream that is closed."""
    for name, closed in (("plain", ""), ("closed", "<&- >&- 2>&-")):
        done = run("convert", str(style), "--to", "diffusers", "-o", str(tmp_path / name), after=closed)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "closed").read_bytes()


@pytest.mark.parametrize(("encoding", "shown"), [("iso8859-5", "st\\xefl"), ("utf-8", "st\xefl")])
def test_letters_that_the_encoding_lacks_are_escaped(style: Path, tmp_path: Path, encoding: str, shown: str) -> None:
    copy = tmp_path / "st\xefl.safetensors"
    copy.write_bytes(style.read_bytes())
    done = run("info", str(copy), before=f"PYTHONIOENCODING={encoding}")
    assert (done.returncode, done.stderr) == (0, "") and shown in done.stdout
    missing = run("info", f"{copy}x", before=f"PYTHONIOENCODING={encoding}")
    assert missing.returncode == 1 and shown in missing.stderr and missing.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(words: list[str]) -> None:
    done = run(*words, after="> /dev/full")
    assert (done.returncode, done.stderr) == (1, f"error: stdout: {os.strerror(errno.ENOSPC)}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_messages_that_cannot_be_told_change_no_exit_code(style: Path, tmp_path: Path) -> None:
    assert run("info", str(style), after="2> /dev/full").returncode == 0
    assert run("info", str(tmp_path / "none"), after="2> /dev/full").returncode == 1
    assert run("nonsense", after="2> /dev/full").returncode == 2


def test_a_reader_that_goes_away_is_no_error(words: list[str]) -> None:
    done = run(*words, after="| head -c 10; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout) <= 10
    done = run(*words, after="| true; exit ${PIPESTATUS[0]}", before="sleep 0.2 |")  # gone before the first byte
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_goes_away_does_not_change_what_is_found(style: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(style.read_bytes()[:-9])
    done = run("validate", str(tmp_path / "cut"), after="| true; exit ${PIPESTATUS[1]}", before="true |")
    assert (done.returncode, done.stderr) == (1, "")


def test_json_is_all_there_is_on_stdout(style: Path) -> None:
    done = run("info", "--json", str(style))
    assert done.returncode == 0 and json.loads(done.stdout)["modules"] == 4 and not done.stderr


@pytest.mark.parametrize("words", [["nonsense"], ["info", "--nonsense"], ["convert"], ["info"]])
def test_a_command_line_that_is_none(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2 and not done.stdout
    assert "Traceback" not in done.stderr and "Error" in done.stderr


# -- signals


def start(*words: str, prepare: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LORATOOL, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=prepare,
    )


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, float]:
    """Sends a signal; exit code, stderr, and seconds that it took."""
    with process:
        process.send_signal(number)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors, time.monotonic() - sent


def told(number: signal.Signals) -> str:
    return f"stopped by {number.name}: nothing unfinished was kept\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two LoRAs of Flux of 1.2 GB each, rank 512, which take no room on the disk."""
    folder = tmp_path_factory.mktemp("large")
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(19):
        for part in ("img_mlp", "txt_mlp"):
            stem = f"lora_unet_double_blocks_{block}_{part}_0"
            shapes |= {f"{stem}.lora_down.weight": (512, 3072), f"{stem}.lora_up.weight": (12288, 512)}
    for name in ("a", "b"):
        zero_file(folder / f"{name}.safetensors", shapes, "F32")
    yield folder


COMMANDS = {
    "convert": ["convert", "a.safetensors", "--to", "diffusers"],
    "merge": ["merge", "a.safetensors", "b.safetensors", "--method", "concat"],
    "resize": ["resize", "a.safetensors", "--rank", "8"],
}


def begun(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits until the output is being written."""
    deadline = time.monotonic() + 15
    while not any(".loratool-" in name for name in os.listdir(folder)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_stops_what_writes_a_large_file(
    large: Path, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    words = [str(large / word) if word.endswith(".safetensors") else word for word in COMMANDS[name]]
    process = start(*words, "-o", str(tmp_path / "out.safetensors"))
    if name == "convert":
        begun(process, tmp_path)
    else:  # compute for minutes before they write
        time.sleep(1.5)
        assert process.poll() is None
    code, errors, took = end(process, number)
    assert (code, errors) == (CODES[number], told(number))
    assert took < 5
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_that_the_parent_ignores_stays_ignored(style: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As nohup does, and shells for what runs in the background."""
    with start("info", "--json", str(style), prepare=lambda: signal.signal(number, signal.SIG_IGN)) as process:
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.01)
        output, errors = process.communicate()
    assert process.returncode == 0 and json.loads(output)["modules"] == 4 and not errors


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_before_the_command_has_begun(number: signal.Signals, tmp_path: Path) -> None:
    """While the modules of the command line are imported: one line, no traceback."""
    (tmp_path / "typer.py").write_text("import sys, time\nprint('importing', flush=True)\ntime.sleep(30)\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])}
    process = subprocess.Popen(
        [*LORATOOL, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    code, errors, took = end(process, number)
    assert (code, errors) == (CODES[number], told(number)) and took < 5
