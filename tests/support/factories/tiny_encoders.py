"""Tiny random encoders, as transformers saves them, and their descriptions."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from manyhats.adapters.sites import BaseDescription
from manyhats.engine.model.describe import describe
from manyhats.engine.model.families.reading import read_family
from support.factories.tiny_models import randomize, save_tokenizer

_MODERNBERT = {
    "num_hidden_layers": 3,
    "local_attention": 48,
    "max_position_embeddings": 1024,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 1},
    "distilbert": {},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32},
    "albert grouped": {"embedding_size": 32, "num_hidden_layers": 3, "num_hidden_groups": 2},
    "modernbert": _MODERNBERT,
    "modernbert mean": {
        **_MODERNBERT,
        "classifier_pooling": "mean",
        "classifier_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "local_attention": 6,
    },
}
"""``model_type``, and perhaps a word → fields of its config."""
LINEARS = {
    "distilbert": ["q_lin", "v_lin", "lin1", "lin2"],
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra"),
        ("query", "value", "intermediate.dense", "output.dense"),
    ),
    **dict.fromkeys(("albert", "albert grouped"), ("query", "value", "ffn", "ffn_output")),
    **dict.fromkeys(("modernbert", "modernbert mean"), ("Wqkv", "attn.Wo", "Wi", "mlp.Wo")),
}
"""Linears to adapt, by family; the last stands behind the activation."""
POOLERS = {
    "bert": "pooler.dense",
    "albert": "pooler",
    "modernbert": "head.dense",
    "modernbert mean": "head.dense",
}
"""What adapters may change in front of a classifier."""
PROJECTIONS = {"electra": "embeddings_project", "albert grouped": "embedding_hidden_mapping_in"}
"""What makes embeddings as wide as the layers."""
AUTO = dict.fromkeys(("modernbert", "modernbert mean"), "AutoModelForMaskedLM")
"""The class to save a base with, where the plain one leaves out what is in front of a classifier."""
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}
_DISTILBERT_SIZES = {
    "vocab_size": 320,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 128,
    "max_position_embeddings": 256,
}


HIDDEN = 16
"""Hidden size of ``make_encoder_base``."""


def make_encoder_base(
    model_type: str = "bert", embedding_size: int = HIDDEN, **fields: Any
) -> BaseDescription:
    """The description of a small encoder of two layers; ``fields`` are of ``describe``."""
    config = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "embedding_size": embedding_size,
    }
    if model_type == "distilbert":
        config = {"model_type": model_type, "n_layers": 2, "dim": HIDDEN, "n_heads": 2, "hidden_dim": 24}
    return describe(read_family(config), names=["org/tiny"], digest="sha256:" + "0" * 64, **fields)


def make_encoder(
    directory: Path, family: str = "bert", *, seed: int = 0, auto: str = "AutoModel", **sizes: int
) -> Path:
    """Save a random encoder of a family.

    Args:
        directory: created if need be.
        family: one of ``ENCODERS``.
        seed: of the weights.
        auto: the class that saves it, which decides on its tensors' prefix.
        sizes: of its config, by the family's names.
    """
    transformers: Any = import_module("transformers")
    usual = _DISTILBERT_SIZES if family == "distilbert" else _SIZES
    config = transformers.AutoConfig.for_model(family.split()[0], **{**usual, **ENCODERS[family], **sizes})
    with torch.random.fork_rng():
        model = getattr(transformers, auto).from_config(config)
    randomize(model, seed)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory
