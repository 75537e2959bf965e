"""Compiles kernels for GPUs that need not be there, and reads what the compiler made of them.

``triton.compile`` needs no driver, and Triton brings ``ptxas`` and ``cuobjdump``. Each ``Entry`` says which tensor-core
instruction a kernel must come to; another one, a stack, spills, too many registers or too much shared memory is a
fault. So are loads of four bytes into shared memory in numbers: a pipelined table lookup goes wrong in this way.

``python -m support.gpu.compiling MODULE`` in ``tests`` compiles the ``ENTRIES`` of a module and prints what it found;
``faults_of(MODULE)`` does so in a process without the interpreter, which compiles nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""What a block may have, by compute capability."""
MAX_REGISTERS = 255
MAX_NARROW = 8
"""Loads of four bytes into shared memory."""


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration.

    Attributes:
        kernel: made by ``triton.jit``.
        sm: compute capability, such as 90.
        types: of its arguments that are no constants, such as ``"*bf16"`` and ``"i32"``, by name.
        constants: its arguments of type ``constexpr``.
        mma: the tensor-core instruction, ``HMMA`` or ``HGMMA``; empty for none.
        aligned: integers that are multiples of 16, as pointers are.
    """

    kernel: Any
    sm: int
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    mma: str = ""
    aligned: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"sm_{self.sm} {self.kernel.__name__} {constants} stages={self.num_stages}"


def faults_of(module: str) -> list[str]:
    """What is wrong with the ``ENTRIES`` of a module, compiled in a process of its own; a line each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "support.gpu.compiling", module, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def faults(entry: Entry, *, quiet: bool = True) -> list[str]:
    """What is wrong with one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: entry.types.get(name, "constexpr") for name in entry.kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in entry.aligned
    }
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=dict(entry.constants), attrs=aligned)
    options = {
        "num_warps": entry.num_warps,
        "num_stages": entry.num_stages,
        "enable_fp_fusion": entry.enable_fp_fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", entry.sm, 32), options=options)
    usage, code = _read(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.MULTILINE)
    count = {
        name: sum(each.split(".")[0] == name for each in names) for name in ("HMMA", "HGMMA", "LDL", "STL")
    }
    narrow = sum(each.startswith("LDGSTS") and not each.endswith(("64", "128")) for each in names)
    if not quiet:
        print(
            f"{entry}: {registers} registers, {compiled.metadata.shared >> 10} KB shared, {count}, {narrow} narrow"
        )
    checks = {
        f"no {entry.mma}": bool(entry.mma) and not count[entry.mma],
        "another tensor-core instruction": any(
            count[name] for name in ("HMMA", "HGMMA") if name != entry.mma
        ),
        f"a stack of {stack} bytes": stack > 0,
        "spills": count["LDL"] + count["STL"] > 0,
        f"{registers} registers": registers > MAX_REGISTERS,
        f"{compiled.metadata.shared} bytes of shared memory": compiled.metadata.shared
        > SHARED_BYTES[entry.sm],
        f"{narrow} loads of four bytes": narrow > MAX_NARROW,
    }
    return [f"{entry}: {what}" for what, is_wrong in checks.items() if is_wrong]


def _read(cubin: bytes) -> tuple[str, str]:
    """What ``cuobjdump`` says of resources, and the instructions."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([program, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    return usage.stdout + usage.stderr, code.stdout


def main(arguments: Sequence[str]) -> int:
    entries: Sequence[Entry] = importlib.import_module(arguments[0]).ENTRIES
    is_quiet = "--json" in arguments
    found = [fault for entry in entries for fault in faults(entry, quiet=is_quiet)]
    print(json.dumps(found) if is_quiet else "\n".join([*found, f"{len(found)} faults"]))
    return 0 if is_quiet else int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
