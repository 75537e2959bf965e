"""A base's shape, from its config alone: no weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from manyhats.adapters.errors import shown
from manyhats.engine.checkpoints.checkpoint import check_quantization_config, expected_shapes, read_json
from manyhats.engine.checkpoints.fetch import KNOWN_MODELS
from manyhats.engine.errors import ModelError
from manyhats.engine.home import default_home
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.families.reading import FAMILIES, read_family
from manyhats.engine.model.layout import Family
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from manyhats.trainer.settings.declaring import LARGEST

_CONFIG = "config.json"
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_LIMITS: Mapping[str, int] = {
    **dict.fromkeys((*_NEEDED, "num_key_value_heads", "max_position_embeddings"), LARGEST),
    # Each layer is drawn up by itself, with a frequency per pair of a head's values.
    "num_hidden_layers": 10_000,
    "head_dim": 4096,
}


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What memory depends on of a base.

    Attributes:
        name: as it was asked for.
        directory: holds the config; a tokenizer may lie there too.
        family: which linears, norms and biases there are.
        stored_bytes: of a value in the checkpoint.
        is_stored_nf4: whether the checkpoint's linears are NF4 already.
    """

    name: str
    directory: Path
    family: Family
    stored_bytes: int
    is_stored_nf4: bool

    @property
    def architecture(self) -> Architecture:
        """The family's."""
        return self.family.architecture

    @property
    def num_linear_parameters(self) -> int:
        """Of the layers' linears, Σ d_out · d_in."""
        return self.architecture.num_linear_parameters()

    @property
    def num_table_parameters(self) -> int:
        """Of the embedding, V · D, and of the head where it has a matrix of its own."""
        architecture = self.architecture
        return architecture.vocab_size * architecture.hidden_size * (1 if architecture.head.is_tied else 2)

    @property
    def num_parameters(self) -> int:
        """Of everything."""
        return sum(math.prod(shape) for shape in expected_shapes(self.family).values())

    @property
    def num_other_parameters(self) -> int:
        """Of norms and biases."""
        return self.num_parameters - self.num_linear_parameters - self.num_table_parameters

    @property
    def nf4_bytes(self) -> int:
        """The layers' linears in NF4: 4 bits a value, a byte per 64 of them, 4 more per 64 · 256."""
        blocks = self.num_linear_parameters / BLOCK_SIZE
        return round(self.num_linear_parameters / 2 + blocks + 4 * blocks / NESTED_BLOCK_SIZE)


def read_shape(source: str, home: Path | None = None) -> BaseShape:
    """The shape of a model.

    Args:
        source: an alias that has been fetched, a Hugging Face directory, a hub id, or a ``config.json``.
        home: holds fetched models; None takes the default.

    Raises:
        ModelError: there is no such config, it lacks a size, or it describes a model that is not supported.
    """
    path = _config_path(source, default_home() if home is None else home)
    try:
        raw = read_json(path)
        _check_sizes(raw)
        return BaseShape(
            name=source,
            directory=path.parent,
            family=read_family(raw),
            stored_bytes=_stored_bytes(raw),
            is_stored_nf4=check_quantization_config(raw),
        )
    except ModelError as error:
        raise ModelError(_of_file(path, str(error))) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: a field has the wrong type or value: {error}") from error


def _of_file(path: Path, message: str) -> str:
    """The message under the file's own name, which need not be ``config.json``."""
    what = message.removeprefix(f"{_CONFIG}: ")
    return message if what == message else f"{path}: {what}"


def _check_sizes(raw: Mapping[str, Any]) -> None:
    """Refuse a config whose shape is another model's because a number is missing, or takes long to draw up.

    Raises:
        ModelError: names the field.
    """
    if raw.get("model_type") not in FAMILIES:
        return  # it is refused by that name, and may have others for its sizes
    for name in _NEEDED:
        if raw.get(name) is None:
            raise ModelError(f"{_CONFIG}: has no {name}")
    for name, largest in _LIMITS.items():
        value = raw.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise ModelError(
                f"{_CONFIG}: {name} must be a whole number from 1 to {largest}, not {shown(repr(value))}"
            )
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    if head_dim > _LIMITS["head_dim"]:
        raise ModelError(f"{_CONFIG}: a head has {head_dim} values; the limit is {_LIMITS['head_dim']}")


def _config_path(source: str, home: Path) -> Path:
    if source in KNOWN_MODELS:
        path = home / "models" / source / _CONFIG
        if not path.is_file():
            raise ModelError(f"{source} is not on this machine; `manyhats model fetch {source}` gets it")
        return path
    path = Path(os.path.expanduser(source))  # unlike Path's own, it leaves an unknown user's as it is
    if path.is_file():
        return path
    if path.is_dir():
        return path / _CONFIG
    if path.exists():
        raise ModelError(f"{source}: is neither a regular file nor a directory")
    if source.startswith(("/", ".", "~")) or path.suffix == ".json":
        raise ModelError(f"{source}: there is no such file or directory")
    if source.count("/") != 1:
        raise ModelError(f"{source!r} is no directory, no config.json, no hub id (org/name) and no alias")
    try:
        return Path(hf_hub_download(source, _CONFIG))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"cannot get {_CONFIG} of {source}: {error}") from error


def _stored_bytes(raw: Mapping[str, Any]) -> int:
    """By the config's dtype; float32, the larger, where it is silent."""
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    return _STORED_BYTES.get(str(dtype).removeprefix("torch."), 4)
