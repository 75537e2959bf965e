"""Bottleneck adapters on the sub-layers' outputs, in AdapterHub's layout.

Source: Houlsby et al. 2019 (arXiv:1902.00751); Pfeiffer et al. 2021 (arXiv:2005.00247); He et al. 2022
(arXiv:2110.04366).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Generator, nn

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.formats.adapterhub.places import places_of
from manyhats.adapters.formats.adapterhub.tensors import full_path
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.initialization import kaiming_uniform, zeros
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.settings.methods import BottleneckSettings

_VERSION = "adapters.1.3.0"

# The transformers classes that the library records, for the families that it and the server share.
_MODEL_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "GPT2LMHeadModel",
        "gptj": "GPTJForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "albert": "AlbertAdapterModel",
        "bert": "BertAdapterModel",
        "distilbert": "DistilBertAdapterModel",
        "electra": "ElectraAdapterModel",
        "roberta": "RobertaAdapterModel",
        "xlm-roberta": "XLMRobertaAdapterModel",
    }
)

# What distinguishes the library's SeqBnConfig, DoubleSeqBnConfig and ParBnConfig.
_VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "seq": {"mh_adapter": False, "original_ln_before": True, "is_parallel": False, "scaling": 1.0},
        "double_seq": {"mh_adapter": True, "original_ln_before": False, "is_parallel": False, "scaling": 1.0},
        "parallel": {"mh_adapter": False, "original_ln_before": False, "is_parallel": True, "scaling": 4.0},
    }
)


def make_bottleneck(
    settings: BottleneckSettings, task: str, model: LoadedModel, generator: Generator
) -> ParametrizedAdapter:
    """Fresh bottlenecks: D by Kaiming's bound, everything else zero, so that they change nothing yet.

    That is the library's ``mam_adapter`` initialization. Its ``bert``, for the sequential variants, starts with a
    nonzero U.

    Raises:
        SettingError: a setting is not one of the library's, or does not fit the base.
    """
    hidden_size = model.architecture.hidden_size
    size = bottleneck_size(settings, hidden_size)
    name = _adapter_name(task)
    inner = _method_config(settings)
    base, places = model.description, places_of(model.architecture.model_type)
    parameters: dict[str, nn.Parameter] = {}
    for layer in range(base.num_layers):
        for sub_layer in ("attention", "feed_forward") if inner["mh_adapter"] else ("feed_forward",):
            module = full_path(base, f"{places.module(layer, sub_layer)}.adapters.{name}.")
            parameters[f"{module}adapter_down.0.weight"] = kaiming_uniform(size, hidden_size, generator)
            parameters[f"{module}adapter_down.0.bias"] = zeros(size)
            parameters[f"{module}adapter_up.weight"] = zeros(hidden_size, size)
            parameters[f"{module}adapter_up.bias"] = zeros(hidden_size)
    return ParametrizedAdapter(
        method=AdapterMethod.BOTTLENECK,
        config=_config(inner, name, model),
        parameters=parameters,
        base=base,
    )


def bottleneck_size(settings: BottleneckSettings, hidden_size: int) -> int:
    """The width of each bottleneck, D // ``reduction_factor``.

    Raises:
        SettingError: ``reduction_factor`` leaves nothing.
    """
    size = hidden_size // settings.reduction_factor
    if size < 1:
        raise SettingError(
            "reduction_factor", f"is {settings.reduction_factor}, above the base's hidden size {hidden_size}"
        )
    return size


def _method_config(settings: BottleneckSettings) -> dict[str, Any]:
    """The library's ``BnConfig``, with everything it saves."""
    if settings.variant not in _VARIANTS:
        raise SettingError("variant", f"must be one of {', '.join(_VARIANTS)}, not {settings.variant!r}")
    config = {
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "factorized_phm_W": True,
        "factorized_phm_rule": False,
        "hypercomplex_nonlinearity": "glorot-uniform",
        "init_weights": "mam_adapter",
        "init_weights_seed": None,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "learn_phm": True,
        "leave_out": [],
        "ln_after": False,
        "ln_before": False,
        "non_linearity": settings.non_linearity,
        "original_ln_after": True,
        "output_adapter": True,
        "phm_bias": True,
        "phm_c_init": "normal",
        "phm_dim": 4,
        "phm_init_range": 0.0001,
        "phm_layer": False,
        "phm_rank": 1,
        "reduction_factor": settings.reduction_factor,
        "residual_before_ln": True,
        "shared_W_phm": False,
        "shared_phm_rule": True,
        "stochastic_depth": 0.0,
        "use_gating": False,
        **_VARIANTS[settings.variant],
    }
    if settings.scaling is not None:
        config["scaling"] = float(settings.scaling)
    return dict(sorted(config.items()))


def _config(inner: Mapping[str, Any], name: str, model: LoadedModel) -> dict[str, Any]:
    model_type = model.architecture.model_type
    return {
        "config": dict(inner),
        "hidden_size": model.architecture.hidden_size,
        # Other bases are refused by the check that every fresh adapter goes through.
        "model_class": _MODEL_CLASSES.get(model_type),
        "model_name": model.reference,
        "model_type": model_type,
        "name": name,
        "version": _VERSION,
    }


def _adapter_name(task: str) -> str:
    """The task as a key of ``nn.ModuleDict``, in which the library keeps adapters."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", task)
    return f"{name}_adapter" if not name or hasattr(nn.ModuleDict(), name) else name
