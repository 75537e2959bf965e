"""A base's shape, from its config alone: no weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from manyhats.engine.errors import ModelError
from manyhats.engine.model.checkpoint import check_quantization_config, expected_shapes, read_json
from manyhats.engine.model.config import DecoderConfig
from manyhats.engine.model.directories import default_home
from manyhats.engine.model.families import Architecture, linear_shapes, read_architecture
from manyhats.engine.model.fetch import KNOWN_MODELS
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

_CONFIG = "config.json"
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What memory depends on of a base.

    Attributes:
        name: as it was asked for.
        directory: holds the config; a tokenizer may lie there too.
        architecture: which linears, norms and biases there are.
        stored_bytes: of a value in the checkpoint.
        is_stored_nf4: whether the checkpoint's linears are NF4 already.
    """

    name: str
    directory: Path
    architecture: Architecture
    stored_bytes: int
    is_stored_nf4: bool

    @property
    def config(self) -> DecoderConfig:
        """The decoder's."""
        return self.architecture.decoder

    @property
    def num_linear_parameters(self) -> int:
        """Of the layers' linears, Σ d_out · d_in."""
        per_layer = sum(d_in * d_out for d_in, d_out in linear_shapes(self.config).values())
        return self.config.num_layers * per_layer

    @property
    def num_table_parameters(self) -> int:
        """Of the embedding, V · D, and of the head where it has a matrix of its own."""
        config = self.config
        return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """Of everything."""
        return sum(math.prod(shape) for shape in expected_shapes(self.architecture).values())

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
        ModelError: there is no such config, or it describes a model that is not supported.
    """
    path = _config_path(source, default_home() if home is None else home)
    raw = read_json(path)
    return BaseShape(
        name=source,
        directory=path.parent,
        architecture=read_architecture(raw),
        stored_bytes=_stored_bytes(raw),
        is_stored_nf4=check_quantization_config(raw),
    )


def _config_path(source: str, home: Path) -> Path:
    if source in KNOWN_MODELS:
        path = home / "models" / source / _CONFIG
        if not path.is_file():
            raise ModelError(f"{source} is not on this machine; `manyhats model fetch {source}` gets it")
        return path
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / _CONFIG
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
