"""NF4 weights cached on disk, so that only the first start with a checkpoint quantizes it.

A cache entry is itself a Hugging Face directory of bitsandbytes NF4 weights: ``config.json`` and ``model.safetensors``,
with a manifest that has the weights' digest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from manyhats.adapters.sites import ROUTER
from manyhats.engine.checkpoints.checkpoint import (
    WEIGHTS_FILE,
    SafetensorsDirectory,
    check_tensors,
    expected_shapes,
    read_json,
)
from manyhats.engine.checkpoints.directories import publish_directory, staged_directory
from manyhats.engine.checkpoints.identity import FileDigests, file_sha256
from manyhats.engine.checkpoints.nf4_format import nf4_to_tensors
from manyhats.engine.errors import ModelError
from manyhats.engine.model.layout import Family
from manyhats.engine.model.nf4 import quantize_nf4
from manyhats.engine.progress import Progress

_LOG = logging.getLogger(__name__)

MANIFEST_FILE = "manyhats.json"
_FORMAT = 2
"""1 had no poolers."""
_QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}


class Nf4Cache:
    """Entries, keyed by the content of the checkpoint they were made from.

    Args:
        directory: holds one directory per entry.
        digests: remembers which files were verified.
    """

    def __init__(self, directory: Path, digests: FileDigests) -> None:
        self._directory = directory
        self._digests = digests

    def path(self, checkpoint_digest: str) -> Path:
        """The path of a checkpoint's entry, existing or not."""
        return self._directory / checkpoint_digest[:32]

    def load(self, checkpoint_digest: str) -> Mapping[str, Tensor] | None:
        """The tensors of an entry; None if there is none, or if it is damaged (which is logged)."""
        entry = self.path(checkpoint_digest)
        if not entry.is_dir():
            return None
        try:
            self._verify(entry)
            return SafetensorsDirectory(entry)
        except ModelError as error:
            _LOG.warning("the cached NF4 weights are damaged and will be rebuilt: %s", error)
            return None

    def check(self, checkpoint_digest: str) -> bool:
        """Whether there is an entry, with the bytes that were stored.

        Raises:
            ModelError: it is damaged.
        """
        entry = self.path(checkpoint_digest)
        if entry.is_dir():
            self._verify(entry)
        return entry.is_dir()

    def _verify(self, entry: Path) -> None:
        manifest = read_json(entry / MANIFEST_FILE)
        weights = entry / WEIGHTS_FILE
        if manifest.get("format") != _FORMAT:
            raise ModelError(f"{entry / MANIFEST_FILE}: has another format")
        if self._digests.sha256(weights) != manifest.get("weights_sha256"):
            raise ModelError(f"{weights}: its digest is not the manifest's")

    def store(self, checkpoint_digest: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """Store an entry; returns whether that was possible. A directory that cannot be written is only logged."""
        entry = self.path(checkpoint_digest)
        try:
            with staged_directory(entry) as staging:
                save_file(dict(tensors), staging / WEIGHTS_FILE, metadata={"format": "pt"})
                manifest = {
                    "format": _FORMAT,
                    "checkpoint_sha256": checkpoint_digest,
                    "weights_sha256": file_sha256(staging / WEIGHTS_FILE),
                }
                _write_json(staging / MANIFEST_FILE, manifest)
                _write_json(staging / "config.json", {**config, "quantization_config": _QUANTIZATION_CONFIG})
                publish_directory(staging, entry, self._is_good)
        except (OSError, SafetensorError) as error:
            _LOG.warning("the NF4 weights cannot be cached, so the next start quantizes again: %s", error)
            return False
        return True

    def _is_good(self, entry: Path) -> bool:
        try:
            self._verify(entry)
        except ModelError:
            return False
        return True


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def quantize_checkpoint(
    tensors: Mapping[str, Tensor], family: Family, progress: Progress
) -> dict[str, Tensor]:
    """A checkpoint with the linears of its layers, but routers, in NF4 and everything else unchanged.

    Raises:
        ModelError: a tensor is missing or has the wrong shape, or a linear's width is not a multiple of 64.
    """
    check_tensors(tensors, family)
    family = family.of_files(tensors)
    layout = family.layout
    linears = {
        f"{family.path(layer, path)}.weight": stored
        for layer, block in enumerate(family.architecture.blocks)
        for path, stored in layout.modules_of(block).items()
        if ROUTER not in stored.members
    }
    dense = set(expected_shapes(family)) - set(linears)
    quantized = {name: tensors[name] for name in sorted(dense)}
    for done, (name, stored) in enumerate(linears.items()):
        progress("quantize", done, len(linears))
        weight = tensors[name].T if stored.is_transposed else tensors[name]
        try:
            quantized |= nf4_to_tensors(name, quantize_nf4(weight), weight.dtype)
        except ModelError as error:
            raise ModelError(f"{name}: {error}; --quantization none serves it") from error
    progress("quantize", len(linears), len(linears))
    return quantized
