"""The systems this one is measured against: transformers with bitsandbytes, and PEFT on top of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import Measurement, Sample, throughput
from benchmarks.worker import Worker
from benchmarks.workload import BASE_CASES, LORA_CASES, Adapter, Case, Workload

TRANSFORMERS = "transformers"
PEFT = "peft"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PROBE_STEPS = 1
_HOPELESS = 1.5
"""A dtype that is slower than another by this factor in a short run is not measured."""


class _StepClock:
    """A streamer of ``generate``: it is given the prompt, then the new tokens of each step."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called when the tokens of a step are known."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""


class BaselineSession:
    """Lives in a worker process; models are loaded as they are first needed."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._models: dict[tuple[str, str], Any] = {}
        self._step_s: dict[tuple[str, str, Case], float] = {}
        self._transformers: Any = import_module("transformers")
        self._transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(workload.settings.threads)

    def dtypes(self) -> tuple[str, ...]:
        """The compute dtypes that may be the best here.

        With a fused bfloat16 kernel for 4-bit weights that is bfloat16. Without one, bitsandbytes dequantizes
        at every call, and bfloat16 products may be slower or faster than float32 ones.
        """
        has_fused_kernel: bool = import_module("bitsandbytes.functional").has_avx512bf16()
        return ("bfloat16",) if has_fused_kernel else ("bfloat16", "float32")

    def probe(self, system: str, dtype: str, case: Case) -> float:
        """Seconds of a short run; the run also warms the model up."""
        clock, started = self._generate(
            system, dtype, case, -1, self._workload.settings.probe_tokens, _PROBE_STEPS
        )
        self._step_s[system, dtype, case] = clock.times_s[-1] - clock.times_s[-2]
        return clock.times_s[-1] - started

    def measure(self, system: str, dtype: str, case: Case, seed: int) -> Measurement:
        """One run of batched, greedy ``generate`` with a KV cache."""
        settings = self._workload.settings
        expected_s = self._step_s.get((system, dtype, case))
        affordable = settings.decode_steps if expected_s is None else int(settings.run_limit_s / expected_s)
        steps = min(settings.decode_steps, max(settings.min_decode_steps, affordable))
        clock, started = self._generate(system, dtype, case, seed, settings.prompt_tokens, steps)
        first, *_ = new_tokens = clock.times_s[1:]
        steps_s = [after - before for before, after in pairwise(new_tokens)]
        self._step_s[system, dtype, case] = median(steps_s)
        return throughput(
            case,
            num_prompt_tokens=case.num_sequences * settings.prompt_tokens,
            prefill_s=first - started,
            intervals_s=steps_s,
        )

    def _generate(
        self, system: str, dtype: str, case: Case, seed: int, prompt_tokens: int, steps: int
    ) -> tuple[_StepClock, float]:
        model = self._model(system, dtype)
        # All prompts have one length, so that left padding is empty and costs the baseline nothing.
        prompts = torch.tensor(self._workload.prompts(case, seed, prompt_tokens))
        options: dict[str, Any] = {}
        if case.num_adapters:
            options["adapter_names"] = [_adapter_name(case.adapter_of(row)) for row in range(len(prompts))]
        clock = _StepClock()
        mask = torch.ones_like(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=prompts, attention_mask=mask, max_new_tokens=steps + 1, streamer=clock, **options
            )
        return clock, started

    def _model(self, system: str, dtype: str) -> Any:
        key = (system, dtype)
        if key not in self._models:
            base = self._load(_DTYPES[dtype])
            self._models[key] = base if system == TRANSFORMERS else self._with_adapters(base, _DTYPES[dtype])
            self._generate(system, dtype, Case(1, int(system == PEFT)), -1, 8, 2)
        return self._models[key]

    def _load(self, dtype: torch.dtype) -> Any:
        model = load_nf4(self._workload.directory, dtype)
        # No EOS: every run has the length it was asked for.
        model.generation_config = self._transformers.GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
        )
        return model.eval()

    def _with_adapters(self, base: Any, dtype: torch.dtype) -> Any:
        loras = {a.name: path for a, path in sorted(self._workload.adapters.items()) if a.method == "lora"}
        (first, first_path), *others = loras.items()
        peft: Any = import_module("peft")
        model = peft.PeftModel.from_pretrained(
            base, first_path, adapter_name=first, autocast_adapter_dtype=False
        )
        for name, path in others:
            model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)  # of the activations, so that nothing is converted
        return model.eval()


def load_nf4(directory: Path, dtype: torch.dtype) -> Any:
    """What transformers and bitsandbytes make of a checkpoint: NF4 with double quantization, computing in ``dtype``."""
    transformers: Any = import_module("transformers")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=quantization, device_map="cpu"
    )


def _adapter_name(adapter: Adapter | None) -> str:
    return "__base__" if adapter is None else adapter.name


class Baseline:
    """A ``System`` in front of the worker: ``transformers`` runs the base, ``peft`` mixed batches of LoRAs.

    ``probes`` are the short runs that chose the dtypes.
    """

    def __init__(self, name: str, worker: Worker) -> None:
        self.name = name
        self._worker = worker
        self._variants: dict[Case, Sequence[str]] = {}
        self.probes: list[Sample] = []

    def variants(self, case: Case) -> Sequence[str]:
        """Compute dtypes: those that a short run does not show to be hopeless."""
        if case not in (LORA_CASES if self.name == PEFT else BASE_CASES):
            return ()
        if case not in self._variants:
            seconds = {dtype: self._probe(case, dtype) for dtype in self._worker.call("dtypes")}
            limit_s = _HOPELESS * min(seconds.values())
            self._variants[case] = [dtype for dtype, run_s in seconds.items() if run_s <= limit_s]
        return self._variants[case]

    def _probe(self, case: Case, dtype: str) -> float:
        seconds: float = self._worker.call("probe", self.name, dtype, case)
        print(f"probe: {case.name} {self.name} {dtype} {seconds:.1f} s", file=sys.stderr, flush=True)
        measurement = Measurement({"run_s": seconds})
        self.probes.append(
            Sample(
                system=self.name,
                variant=dtype,
                case=f"probe {case.name}",
                round=0,
                measurement=measurement,
            )
        )
        return seconds

    def measure(self, case: Case, variant: str, seed: int) -> Measurement:
        """One run in one dtype."""
        result: Measurement = self._worker.call("measure", self.name, variant, case, seed)
        return result
