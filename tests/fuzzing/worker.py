"""Fuzzes one target in this process, by coverage, until its time is over or it fails."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["manyhats.adapters"]):
    from fuzzing.targets import targets

# Over what the process takes once torch is loaded: much more than the largest config or header may come to.
_MEMORY_BYTES = 512 * 2**20
_INPUT_LIMIT_S = 5
_MAX_INPUT_BYTES = 4096
_PLAIN_SHARE = 0.3  # of changes that know nothing of the structure


def main(name: str, directory: Path, seconds: int) -> None:
    """Fuzz; ends the process, with an error if an input crashes, hangs or takes too much memory."""
    target = targets()[name]
    corpus = directory / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(target.seeds):
        (corpus / f"seed-{i}").write_bytes(seed)
    words = directory / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words if word))
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + _MEMORY_BYTES,) * 2)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={_INPUT_LIMIT_S}",
        f"-max_len={max(_MAX_INPUT_BYTES, *map(len, target.seeds))}",
        f"-dict={words}",
        f"-artifact_prefix={directory}/",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
    ]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < _PLAIN_SHARE:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutate(data, random, target.words, lambda part: atheris.Mutate(part, max_size))[
            :max_size
        ]

    atheris.Setup([sys.argv[0], *options, str(corpus)], target.run, custom_mutator=mutate)
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in word.encode())


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process now."""
    (line,) = (
        text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmData")
    )
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
