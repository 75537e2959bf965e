"""What is on this machine of a model, read as a start would, before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manyhats.engine.checkpoints.checkpoint import (
    SafetensorsDirectory,
    check_quantization_config,
    check_tensors,
)
from manyhats.engine.checkpoints.fetch import KNOWN_MODELS, find_model, is_whole
from manyhats.engine.checkpoints.found import find_checkpoint
from manyhats.engine.checkpoints.identity import FileDigests
from manyhats.engine.checkpoints.loader import Quantization, usual_quantization
from manyhats.engine.checkpoints.nf4_cache import Nf4Cache
from manyhats.engine.checkpoints.stacked import with_experts_apart
from manyhats.engine.errors import ModelError
from manyhats.engine.model.layout import Family


@dataclass(frozen=True, slots=True)
class ModelOnDisk:
    """A model that can be loaded.

    Attributes:
        quantization: of the layers' linears, as it would be served.
        must_quantize: whether the next start does so, as no earlier one has left the result.
    """

    directory: Path
    family: Family
    quantization: Quantization
    must_quantize: bool


def inspect_model(
    source: str,
    *,
    quantization: Quantization | Literal["auto"],
    max_context_length: int | None,
    home: Path,
) -> ModelOnDisk | None:
    """Read a model's files, all but the values of its weights, whose digests are checked; None if it is not here.

    Raises:
        ModelError: the model cannot be found, read or served; says why.
    """
    located = find_model(source, home)
    if located is None:
        return None
    if source in KNOWN_MODELS and not is_whole(located.directory):
        raise ModelError(
            f"{located.directory}: its files are not those that were fetched;"
            f" `manyhats model fetch {source}` fetches them again"
        )
    digests = FileDigests(home / "digests")
    found = find_checkpoint(located.directory, max_context_length, digests)
    is_stored_nf4 = check_quantization_config(found.config)
    if quantization == "auto":
        quantization = usual_quantization(found.family.architecture, is_stored_nf4=is_stored_nf4)
    check_tensors(with_experts_apart(SafetensorsDirectory(found.directory), found.family), found.family)
    quantizes = quantization == "nf4" and not is_stored_nf4
    is_cached = quantizes and Nf4Cache(home / "nf4", digests).check(found.digest)
    return ModelOnDisk(located.directory, found.family, quantization, quantizes and not is_cached)
