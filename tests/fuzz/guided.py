"""Coverage-guided fuzzing of one target by atheris: `python -m tests.fuzz.guided TARGET [libFuzzer's options]`.

Not a test: `make fuzz` runs it, where atheris can be installed. It mutates bytes towards code that was not reached yet,
beginning with the seeds and with what earlier runs found (in `.fuzz/TARGET`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["loratool"]):
    from tests.fuzz.targets import TARGETS, seeds

CORPUS = Path(".fuzz")
DICTIONARY = [b"collections", b"OrderedDict", b"torch._utils", b"_rebuild_tensor_v2", b"FloatStorage", b"storage"]
DICTIONARY += [b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b'"shape":', b'"data_offsets":', b'"dtype":']


def main() -> None:
    """Runs until libFuzzer's limits (`-runs`, `-max_total_time`) or a case that fails."""
    target = sys.argv[1]
    corpus = CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(seeds(target)):
        (corpus / f"seed-{number}").write_bytes(one)
    words = CORPUS / "words"
    escaped = ["".join(rf"\x{byte:02x}" for byte in word) for word in DICTIONARY]
    words.write_text("".join(f'"{word}"\n' for word in escaped), encoding="ascii")
    options = [sys.argv[0], f"-dict={words}", f"-artifact_prefix={corpus}-failed-", "-timeout=20", *sys.argv[2:]]

    atheris.Setup([*options, str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
