"""A bake of 2 GB is hit by signals, full disks and failing writes: the output is whole, or there is none.

`LORATOOL_LONG=1` (as `make fuzz` sets it) tries many more moments.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bakes import Q, kohya, save
from tests.checkpoints import sparse_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are made by Linux' means")

LONG = bool(os.environ.get("LORATOOL_LONG"))
FRACTIONS = [at / 24 for at in range(1, 24)] if LONG else [0.5, 0.85]
"""When signals come, as parts of the time that a whole bake takes."""

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
SIZE = (320, 320)


class Bench:
    """A checkpoint, a LoRA, the hash of what a bake gives, and how long it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = sparse_checkpoint(folder / "base.safetensors", "sd15", "ldm")
        self.lora = save(folder / "lora.safetensors", kohya({Q: SIZE}))
        self.output = folder / "out.safetensors"
        started = time.monotonic()
        done = self.bake()
        self.seconds = time.monotonic() - started
        assert done.returncode == 0, done.stderr
        self.whole = sha256(self.output)
        self.output.unlink()

    def command(self, output: Path | None = None) -> list[str]:
        words = ["bake", "--base", str(self.base), str(self.lora), "-o", str(output or self.output), "--device", "cpu"]
        return [sys.executable, "-m", "loratool", *words]

    def bake(
        self, limit: Callable[[], None] | None = None, output: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(output),
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=limit,
            env={**os.environ, **environment},
        )

    def left(self) -> list[str]:
        """What is in the folder and should not be."""
        return sorted(set(os.listdir(self.folder)) - {self.base.name, self.lora.name, self.output.name})


def sha256(path: Path) -> str:
    """Of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def one_line(text: str, words: str) -> None:
    """No traceback, one line."""
    assert words in text and "Traceback" not in text
    assert text.count("\n") == 1, text


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults")
    if shutil.disk_usage(folder).free < 8 << 30:
        pytest.skip("needs 8 GiB on the disk")
    found = Bench(folder)
    assert found.base.stat().st_size > 1_500_000_000
    yield found
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_output(bench: Bench) -> Iterator[None]:
    yield
    bench.output.unlink(missing_ok=True)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_at_any_moment(bench: Bench, number: signal.Signals, fraction: float) -> None:
    """Ends within two seconds with the code of the signal, and leaves nothing but what SIGKILL does."""
    with subprocess.Popen(bench.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(bench.seconds * fraction)
        process.send_signal(number)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=30)
        took = time.monotonic() - sent
    if process.returncode == 0:  # was done before
        assert sha256(bench.output) == bench.whole
        return
    assert process.returncode == CODES[number], errors
    assert took < 2
    # It may have got its name just before.
    assert not bench.output.exists() or sha256(bench.output) == bench.whole
    if number is not signal.SIGKILL:
        one_line(errors, f"stopped by {number.name}")
        assert bench.left() == []


def test_the_next_run_cleans_up_what_killed_ones_left(bench: Bench) -> None:
    """And makes what an undisturbed one makes."""
    with subprocess.Popen(bench.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(bench.seconds / 2)
        process.kill()
    bench.output.unlink(missing_ok=True)  # of one that was done before
    done = bench.bake()
    assert done.returncode == 0, done.stderr
    assert bench.left() == [] and sha256(bench.output) == bench.whole


def test_a_file_that_may_not_grow(bench: Bench) -> None:
    """RLIMIT_FSIZE: an error of the writing, not a signal."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))

    done = bench.bake(limit)
    assert done.returncode == 1
    one_line(done.stderr, "File too large")
    assert bench.left() == [] and not bench.output.exists()


def test_a_full_tmpfs(bench: Bench) -> None:
    """Noticed before anything is written, by the room that it takes."""
    script = 'mount -t tmpfs -o size=512m none "$1" && shift && exec "$@"'
    full = bench.folder / "full"
    full.mkdir()
    try:
        command = ["unshare", "-rm", "sh", "-c", script, "sh", str(full), *bench.command(full / "out.safetensors")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip("may not mount a tmpfs here")
        assert done.returncode == 1
        one_line(done.stderr, "not enough room")
    finally:
        full.rmdir()


FAILING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
static long long written;
static int fails(size_t n) {
    long long after = atoll(getenv("FAIL_AFTER"));
    return __sync_add_and_fetch(&written, (long long) n) > after;
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    if (fails(n)) { errno = atoi(getenv("FAIL_WITH")); return -1; }
    return real(fd, data, n, at);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t n, unsigned flags) {
    static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
    if (!real) real = dlsym(RTLD_NEXT, "copy_file_range");
    if (fails(n)) { errno = atoi(getenv("FAIL_WITH")); return -1; }
    return real(from, at, to, there, n, flags);
}
static int flushed(int fd, const char *name) {
    int (*real)(int) = dlsym(RTLD_NEXT, name);
    if (getenv("FAIL_FLUSH")) { errno = atoi(getenv("FAIL_WITH")); return -1; }
    return real(fd);
}
int fsync(int fd) { return flushed(fd, "fsync"); }
int fdatasync(int fd) { return flushed(fd, "fdatasync"); }
"""


@pytest.fixture(scope="module")
def failing(bench: Bench) -> Iterator[Path]:
    """A library that lets writes fail after so many bytes."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = bench.folder.parent / "failing.c", bench.folder.parent / "failing.so"
    source.write_text(FAILING, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    yield library


@pytest.mark.parametrize(("code", "words"), [(5, "Input/output error"), (28, "No space left on device")])
@pytest.mark.parametrize("after", [0, 900_000_000, 2_000_000_000] if LONG else [900_000_000])
def test_a_disk_that_fails(bench: Bench, failing: Path, code: int, words: str, after: int) -> None:
    done = bench.bake(LD_PRELOAD=str(failing), FAIL_AFTER=str(after), FAIL_WITH=str(code))
    assert done.returncode == 1
    one_line(done.stderr, words)
    assert bench.left() == [] and not bench.output.exists()


def test_a_disk_that_fails_when_it_is_flushed(bench: Bench, failing: Path) -> None:
    """What could not be flushed is not named."""
    done = bench.bake(LD_PRELOAD=str(failing), FAIL_AFTER=str(1 << 60), FAIL_WITH="5", FAIL_FLUSH="1")
    assert done.returncode == 1
    one_line(done.stderr, "Input/output error")
    assert bench.left() == [] and not bench.output.exists()


def test_two_writers_at_once(bench: Bench) -> None:
    """One gets the name; the other says that the output exists. Neither removes what the other is at."""
    both = [
        subprocess.Popen(bench.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], errors
    one_line(errors[codes.index(1)], "output exists")
    assert bench.left() == [] and sha256(bench.output) == bench.whole


def test_inputs_that_may_only_be_read(bench: Bench) -> None:
    """Nothing of them changes, not even their times."""
    inputs = [bench.base, bench.lora]
    before = [file.stat().st_mtime_ns for file in inputs]
    for file in inputs:
        file.chmod(0o444)
    try:
        done = bench.bake()
        assert done.returncode == 0, done.stderr
        assert [file.stat().st_mtime_ns for file in inputs] == before
    finally:
        for file in inputs:
            file.chmod(0o644)


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_streams_that_are_closed(bench: Bench, closed: str) -> None:
    """The output is what it is otherwise: nothing that is printed gets into it."""
    redirections = " ".join(f"{fd}>&-" for fd in closed.split())
    done = subprocess.run(["sh", "-c", f'exec "$@" {redirections}', "sh", *bench.command()], timeout=120)
    assert done.returncode == 0
    assert bench.left() == [] and sha256(bench.output) == bench.whole


def test_an_input_that_shrinks_while_it_is_read(bench: Bench) -> None:
    """An error with the file's name, no SIGBUS."""
    base = bench.folder.parent / "shrinking.safetensors"
    subprocess.run(["cp", "--sparse=always", bench.base, base], check=True)
    words = ["bake", "--base", str(base), str(bench.lora), "-o", str(bench.output), "--device", "cpu"]
    command = [sys.executable, "-m", "loratool", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not bench.left() and process.poll() is None:
            time.sleep(0.005)
        os.truncate(base, 100 << 20)
        _, errors = process.communicate(timeout=60)
    base.unlink()
    if process.returncode == 0:
        pytest.skip("it was read before it shrank")
    assert process.returncode == 1
    one_line(errors, "became shorter while it was read")
    assert bench.left() == [] and not bench.output.exists()
