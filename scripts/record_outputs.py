"""Records all that a change of structure must leave as it is, to the bit, and compares two recordings.

    .venv/bin/python scripts/record_outputs.py record before.json
    .venv/bin/python scripts/record_outputs.py compare before.json after.json

A recording has the tokens and log-probabilities of every family, quantization, dtype and method of adapter; raw
logits; registrations, catalogue and store; NF4 weights on disk; trainings of a seed; refusals; and names that others
rely on. Random tiny models and adapters are its inputs, and the default model, which ``make setup`` fetches.

Kernels choose their instructions by the processor: both recordings are made on one machine, with the same packages.
Everything goes through the command line, the client and files, so that the same script can record an older commit:
copy it and ``scripts/recording`` there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recording.differences import differences

# Fixed, as digests of trained artifacts depend on where their base lies.
_ROOT = Path(tempfile.gettempdir()) / "manyhats-recording"
_TESTS = Path(__file__).resolve().parent.parent / "tests"


def main() -> int:
    """Exit status: 1 if recordings differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="record the outputs of this commit")
    record.add_argument("file", type=Path)
    record.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    compare = commands.add_parser("compare", help="print what differs")
    compare.add_argument("was", type=Path)
    compare.add_argument("now", type=Path)
    for command in (record, compare):
        command.add_argument(
            "--only", default="", help="what has this text in its name, such as 'llama, nf4'"
        )
    args = parser.parse_args()
    if args.command == "record":
        sys.path.insert(0, str(_TESTS))
        from recording.everything import record_all  # imports torch, which a comparison has no need of

        with _own_directory(_ROOT):
            content = record_all(_ROOT, args.jobs, args.only)
        args.file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        return 0
    was, now = (json.loads(path.read_bytes()) for path in (args.was, args.now))
    found = [each for each in differences(was, now) if args.only in each.key]
    for each in found:
        print(each)
    return 1 if found else 0


@contextmanager
def _own_directory(root: Path) -> Iterator[None]:
    """An empty directory that no other recording uses meanwhile; kept where the recording fails."""
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        yield
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
