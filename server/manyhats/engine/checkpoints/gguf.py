"""From GGUF to an ordinary Hugging Face directory, with transformers' own reader.

The conversion runs in a separate process (``python -m manyhats.engine.checkpoints.gguf SOURCE TARGET``): it needs
several times the model's memory, and modules that a server never needs again.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

from manyhats.engine.checkpoints.child import run_child
from manyhats.engine.errors import ModelError
from manyhats.engine.progress import Progress, Stage

_TENSORS_BAR = re.compile(r"Converting and de-quantizing GGUF tensors.*?(\d+)/(\d+) \[")


def convert_gguf(source: Path, target: Path, progress: Progress) -> None:
    """Dequantize a GGUF file to bfloat16 and save model, configs and tokenizer under ``target``.

    Args:
        source: the GGUF file.
        target: a directory.
        progress: stage ``dequantize``, in tensors.

    Raises:
        ModelError: the conversion failed; says how.
    """
    dequantize = Stage("dequantize", progress, total=_num_tensors(source))

    def on_line(line: str) -> None:
        if match := _TENSORS_BAR.search(line):
            dequantize.is_at(int(match[1]), int(match[2]))

    command = [sys.executable, "-m", __name__, str(source), str(target)]
    # Nothing may be looked up elsewhere: everything needed is in the file.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    run_child(
        command,
        purpose=f"convert {source.name}",
        on_line=on_line,
        on_silence=dequantize.is_still_there,
        environment=offline,
    )


def _num_tensors(source: Path) -> int:
    """The tensor count in a GGUF header: magic, version (u32), count (u64), little endian."""
    with source.open("rb") as file:
        header = file.read(16)
    if len(header) < 16 or header[:4] != b"GGUF":
        raise ModelError(f"{source.name}: not a GGUF file")
    return int.from_bytes(header[8:], "little")


def _convert(source: Path, target: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers reads the file again for config, weights and tokenizer, and rebuilds the table of names for each
    # module: half the time of a conversion.
    library: Any = gguf
    library.GGUFReader = functools.cache(gguf.GGUFReader)
    library.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    # Values are computed in float32 and rounded once.
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
