"""From a parsed ``config.json`` to the model that it describes, by its family's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from manyhats.engine.errors import ModelError
from manyhats.engine.model.families.bert import bert, camembert, distilbert, electra, roberta, xlm_roberta
from manyhats.engine.model.families.cohere import cohere, cohere2
from manyhats.engine.model.families.fields import RawConfig, standard_names
from manyhats.engine.model.families.gemma import gemma, gemma2, gemma3_text
from manyhats.engine.model.families.gpt2 import gpt2, gptj, starcoder2
from manyhats.engine.model.families.granite import granite
from manyhats.engine.model.families.llama import llama, mistral
from manyhats.engine.model.families.mixtral import mixtral, qwen3_moe
from manyhats.engine.model.families.neox import falcon, gpt_neox
from manyhats.engine.model.families.olmo import olmo2
from manyhats.engine.model.families.opt import opt
from manyhats.engine.model.families.phi import phi, phi3
from manyhats.engine.model.families.qwen import qwen2, qwen3
from manyhats.engine.model.families.smollm import smollm3
from manyhats.engine.model.layout import Family

FAMILIES: Mapping[str, Callable[[RawConfig, int | None], Family]] = {
    "bert": bert,
    "camembert": camembert,
    "cohere": cohere,
    "cohere2": cohere2,
    "distilbert": distilbert,
    "electra": electra,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "roberta": roberta,
    "smollm3": smollm3,
    "starcoder2": starcoder2,
    "xlm-roberta": xlm_roberta,
}
"""``model_type`` → its function."""

_HINTS = {
    "gemma3": "; of gemma3, only the text model, gemma3_text, is",
    "qwen2_moe": "; of Qwen's mixtures, qwen3_moe is",
}


def read_family(config: RawConfig, max_context_length: int | None = None) -> Family:
    """The model that a ``config.json`` describes.

    Args:
        config: the parsed file.
        max_context_length: prompt and output tokens together; None for the model's own maximum.

    Raises:
        ModelError: a model type, activation, kind of RoPE or context length that is not supported; the message lists
            what is.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        hint = _HINTS.get(model_type, "")
        raise ModelError(f"config.json: model_type {model_type!r} is not supported{hint}; these are: {known}")
    try:
        return FAMILIES[model_type](standard_names(config), max_context_length)
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json: a field has the wrong type or is 0: {error}") from error
