"""The shape of a base, from its config alone, without reading any weights."""

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
from manyhats.engine.checkpoints.loader import Quantization, usual_quantization
from manyhats.engine.errors import ModelError
from manyhats.engine.home import default_home
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.families.fields import standard_names
from manyhats.engine.model.families.reading import FAMILIES, read_family
from manyhats.engine.model.layout import Family
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from manyhats.trainer.settings.declaring import LARGEST

_CONFIG = "config.json"
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_LIMITS: Mapping[str, int] = {
    **dict.fromkeys((*_NEEDED, "num_key_value_heads", "max_position_embeddings"), LARGEST),
    # Every layer gets a spec of its own, with one frequency per pair of values in a head.
    "num_hidden_layers": 10_000,
    "head_dim": 4096,
}


@dataclass(frozen=True, slots=True)
class BaseShape:
    """The properties of a base that determine memory use.

    Attributes:
        name: as given by the user.
        directory: contains the config, and possibly a tokenizer.
        family: describes its linears, norms and biases.
        stored_bytes: size of a value in the checkpoint.
        is_stored_nf4: whether the linears are already NF4 in the checkpoint.
    """

    name: str
    directory: Path
    family: Family
    stored_bytes: int
    is_stored_nf4: bool

    @property
    def architecture(self) -> Architecture:
        """The architecture of its family."""
        return self.family.architecture

    @property
    def quantization(self) -> Quantization:
        """How a server stores the linears, unless told otherwise."""
        return usual_quantization(self.architecture, is_stored_nf4=self.is_stored_nf4)

    @property
    def num_linear_parameters(self) -> int:
        """Parameters of the linears in the layers, Σ d_out · d_in."""
        return self.architecture.num_linear_parameters()

    @property
    def num_table_parameters(self) -> int:
        """Parameters of the embedding, V · E, and of the head unless it is tied."""
        architecture = self.architecture
        has_own_head = architecture.head is not None and not architecture.head.is_tied
        return architecture.vocab_size * architecture.embedding.size * (2 if has_own_head else 1)

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return sum(math.prod(shape) for shape in expected_shapes(self.family).values())

    @property
    def num_other_parameters(self) -> int:
        """Parameters of norms, biases and routers."""
        return self.num_parameters - self.num_linear_parameters - self.num_table_parameters

    @property
    def nf4_bytes(self) -> int:
        """Size of the linears in NF4: 4 bits per value, 1 byte per 64 values, 4 bytes per 64 · 256 values."""
        blocks = self.num_linear_parameters / BLOCK_SIZE
        return round(self.num_linear_parameters / 2 + blocks + 4 * blocks / NESTED_BLOCK_SIZE)


def read_shape(source: str, home: Path | None = None) -> BaseShape:
    """The shape of a model.

    Args:
        source: the alias of a fetched model, a Hugging Face directory, a hub id, or a ``config.json``.
        home: holds fetched models; None means the default.

    Raises:
        ModelError: the config does not exist, lacks a size, or describes an unsupported model.
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
    """The message with the actual file name, which may differ from ``config.json``."""
    what = message.removeprefix(f"{_CONFIG}: ")
    return message if what == message else f"{path}: {what}"


def _check_sizes(raw: Mapping[str, Any]) -> None:
    """Refuse a config with a missing size, which a default would fill in wrongly, or with an excessive one.

    Raises:
        ModelError: names the field.
    """
    if raw.get("model_type") not in FAMILIES:
        return  # refused later, by its model_type; its sizes may have other names
    raw = standard_names(raw)
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
    """From the dtype in the config; float32, the largest, if there is none."""
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    return _STORED_BYTES.get(str(dtype).removeprefix("torch."), 4)
