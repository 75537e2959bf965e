"""Part F: transformers with bitsandbytes on the same weights, and PEFT on top of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.linears import quant_state
from benchmarks.gpu.model import RandomModel, make_model
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale
from manyhats.engine.model.nf4 import BLOCK_SIZE, Nf4Weight

_ROWS = (1, 8, 32)
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(out: Recorder, scale: Scale) -> None:
    """The base, then adapters."""
    device = torch.device(scale.device)
    random = make_model(scale.shape, device)
    base = _transformers_model(random, device)
    prompts = _Prompts(scale, device)
    for rows in _ROWS if scale.is_gpu else _ROWS[:1]:
        if out.is_late:
            return
        times = _decode(base, prompts.of(rows), scale.peer_steps)
        out.record("transformers", rows=rows, step_ms=1000 * median(times), tokens_per_s=rows / median(times))
    try:
        model = _with_adapters(base, scale)
    except ImportError as error:
        out.lacks(f"PEFT: {error}")
        return
    for measure in (_switched, _mixed):
        if not out.is_late:
            with out.going_on(f"PEFT: {measure.__name__}"):
                measure(out, model, prompts, scale)


class _Prompts:
    """Random tokens, as many as the engine's steps have before them."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self._size, self._vocab_size, self._device = scale.step_context, scale.shape.vocab_size, device

    def of(self, rows: int) -> Tensor:
        """[rows, length] int64."""
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(0, self._vocab_size, (rows, self._size), generator=generator)
        return ids.to(self._device)


class _StepClock:
    """A streamer of ``generate``: it is given the prompt, then the new tokens of each step, on the host."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called when a step's tokens are known."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""


def _decode(model: Any, prompts: Tensor, steps: int, **options: Any) -> list[float]:
    """Seconds of each step behind the first token; a short run warms up."""
    _generate(model, prompts, 2, **options)
    return [after - before for before, after in pairwise(_generate(model, prompts, steps + 1, **options)[1:])]


def _generate(model: Any, prompts: Tensor, count: int, **options: Any) -> list[float]:
    clock = _StepClock()
    with torch.inference_mode():
        model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            streamer=clock,
            **options,
        )
    return clock.times_s


def _transformers_model(random: RandomModel, device: torch.device) -> Any:
    """A Llama of transformers' whose linears are bitsandbytes', and whose tensors are the random model's own."""
    transformers = import_module("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in random.config.items() if k != "model_type"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    weights = random.weights
    for index, (layer, block) in enumerate(zip(model.model.layers, weights.blocks, strict=True)):
        for module in (layer.self_attn, layer.mlp):
            for name in _MODULES:
                if hasattr(module, name):
                    matrix = block.linears[name].matrix
                    assert isinstance(matrix, Nf4Weight), index
                    setattr(module, name, _linear4bit(matrix))
        layer.input_layernorm.weight = _parameter(block.norms["attention_before"].weight)
        layer.post_attention_layernorm.weight = _parameter(block.norms["feed_forward_before"].weight)
    assert weights.final_norm is not None
    assert isinstance(weights.head.matrix, Tensor)
    model.model.norm.weight = _parameter(weights.final_norm.weight)
    model.model.embed_tokens.weight = _parameter(weights.embedding)
    model.lm_head.weight = _parameter(weights.head.matrix)
    with device:  # its table is computed
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = True  # by which PEFT knows
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    return model.eval()


def _parameter(values: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.bfloat16(), requires_grad=False)


def _linear4bit(matrix: Nf4Weight) -> Any:
    nn, functional = import_module("bitsandbytes.nn"), import_module("bitsandbytes.functional")
    rows, columns = matrix.shape
    linear = nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    linear.weight = nn.Params4bit(
        data=matrix.packed.view(-1, 1),
        requires_grad=False,
        quant_state=quant_state(functional, matrix),
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
        quant_type="nf4",
        module=linear,
        bnb_quantized=True,
    )
    linear.quant_state = linear.weight.quant_state
    return linear


def _with_adapters(base: Any, scale: Scale) -> Any:
    peft = import_module("peft")
    config = peft.LoraConfig(
        r=scale.rank, lora_alpha=scale.rank, target_modules=list(_MODULES), task_type="CAUSAL_LM"
    )
    first, *others = _names(scale)
    model = peft.get_peft_model(base, config, adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(base.device, torch.bfloat16)
    return model.eval()


def _names(scale: Scale) -> Sequence[str]:
    return [f"adapter{index}" for index in range(scale.num_peer_adapters)]


def _switched(out: Recorder, model: Any, prompts: _Prompts, scale: Scale) -> None:
    """One request after another, each on an adapter of its own."""
    steps: list[float] = []
    switches: list[float] = []
    _decode(model, prompts.of(1), 2)
    for name in _names(scale):
        began_s = time.perf_counter()
        model.set_adapter(name)
        switches.append(time.perf_counter() - began_s)
        steps += [
            after - before
            for before, after in pairwise(_generate(model, prompts.of(1), scale.peer_steps + 1)[1:])
        ]
    out.record(
        "peft, switched",
        adapters=scale.num_peer_adapters,
        step_ms=1000 * median(steps),
        switch_ms=1000 * median(switches),
        tokens_per_s=len(steps) / (sum(steps) + sum(switches)),
    )


def _mixed(out: Recorder, model: Any, prompts: _Prompts, scale: Scale) -> None:
    """All adapters in one batch, as PEFT has it."""
    names = list(_names(scale))
    times = _decode(model, prompts.of(len(names)), scale.peer_steps, adapter_names=names)
    out.record(
        "peft, in one batch",
        adapters=len(names),
        rows=len(names),
        step_ms=1000 * median(times),
        tokens_per_s=len(names) / median(times),
    )
