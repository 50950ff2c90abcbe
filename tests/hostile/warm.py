"""Runs command lines as processes of their own, forked from one that has imported the program: far faster.

Reads one JSON list of words a line; for each, forks, limits the child, runs the command, and writes one JSON object
with its exit code, output, CPU seconds and peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from typing import Any

ADDRESS_SPACE = 4 << 30
CPU_SECONDS = 60
MOST_OUTPUT = 8 << 20


def child(words: list[str], out: int, err: int, told: int) -> None:
    """Runs a command line and ends."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    signal.alarm(120)
    code = 70
    try:
        from loratool.cli.main import app

        app(words)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0 if done.code is None else 71
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(told, " ".join({"torch", "numpy"} & sys.modules.keys()).encode())
        os._exit(code)


def run(words: list[str]) -> dict[str, Any]:
    """What became of one command line."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as told:
        number = os.fork()
        if not number:
            child(words, out.fileno(), err.fileno(), told.fileno())
        _, status, usage = os.wait4(number, 0)
        texts = []
        for file in (out, err, told):
            file.seek(0)
            texts.append(file.read(MOST_OUTPUT).decode("utf-8", "backslashreplace"))
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": texts[0],
        "err": texts[1],
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss << 10,
        "loaded": texts[2],
    }


def main() -> None:
    """Warms up with a file that is named, then serves."""
    os.environ["COLUMNS"] = "80"
    for words in (["info", sys.argv[1]], ["validate", sys.argv[1]]):
        run(words)
    from loratool.core.registry import architectures, checks, families, layouts

    assert all([architectures(), checks(), families(), layouts()])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
