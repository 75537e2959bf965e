"""The trainers that are compared, each in a worker process: whole optimizer steps, from batch to moved parameters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import load_nf4
from benchmarks.measure import Measurement
from benchmarks.training.cases import TrainingCase, TrainingWorkload, tokens_per_s
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.trainer.data.dataset import DataCounts, Dataset, TokenizedRows
from manyhats.trainer.data.task_data import TaskData
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.run.training_run import TrainingRun
from manyhats.trainer.settings.methods import ALL_LINEARS, LoraSettings
from manyhats.trainer.settings.settings import DataSettings, OptimizationSettings, TrainSettings

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class OwnTrainer:
    """``TrainingRun``, as ``manyhats train lora`` runs it."""

    def __init__(self, workload: TrainingWorkload) -> None:
        self._workload = workload
        self._models: dict[str, LoadedModel] = {}
        torch.set_num_threads(workload.threads)

    def variants(self) -> Sequence[str]:
        """Compute dtypes."""
        return tuple(_DTYPES)

    def measure(self, case: TrainingCase, dtype: str, seed: int, steps: int) -> Measurement:
        """Some steps."""
        run = self._run(case, dtype, seed, steps)
        ends_s, tokens = [time.perf_counter()], []
        while not run.is_done:
            tokens.append(run.step().num_tokens)
            ends_s.append(time.perf_counter())
        return _measurement(tokens, ends_s)

    def _run(self, case: TrainingCase, dtype: str, seed: int, steps: int) -> TrainingRun:
        workload = self._workload
        model = self._model(dtype)
        settings = TrainSettings(
            task="bench",
            adapter=LoraSettings(rank=workload.rank, alpha=workload.alpha),
            data=DataSettings(train="random"),
            optimization=OptimizationSettings(
                batch_size=workload.batch_size,
                learning_rate=workload.learning_rate,
                schedule="constant",
                warmup_steps=0,
            ),
        )
        decoder = TrainingDecoder(
            model,
            dtype=_DTYPES[dtype],
            gradient_checkpointing=case.checkpointing,
            device=torch.device("cpu"),
        )
        adapter = make_adapter(settings.adapter, settings.task, model, seed=seed)
        data = TaskData(_dataset(workload.rows(case, seed, steps)), held_out=None)
        return TrainingRun(settings, decoder, adapter, data)

    def _model(self, dtype: str) -> LoadedModel:
        if dtype not in self._models:
            self._models[dtype] = load_model(self._workload.model, quantization="nf4", dtype=_DTYPES[dtype])
        return self._models[dtype]


def _dataset(rows: Sequence[tuple[list[int], int]]) -> Dataset:
    lengths = [len(ids) for ids, _ in rows]
    learned = [[place >= first for place in range(len(ids))] for ids, first in rows]
    return Dataset(
        rows=TokenizedRows(
            np.concatenate([np.array(ids, np.int32) for ids, _ in rows]),
            np.concatenate([np.array(each, np.bool_) for each in learned]),
            np.cumsum([0, *lengths], dtype=np.int64),
        ),
        source="random",
        lines=list(range(1, len(rows) + 1)),
        prompt_lengths=[first for _, first in rows],
        completions=[""] * len(rows),
        labels=(),
        counts=DataCounts(),
    )


class PeftTrainer:
    """PEFT's LoRA on a bitsandbytes model, trained by transformers' Trainer."""

    def __init__(self, workload: TrainingWorkload) -> None:
        self._workload = workload
        self._transformers: Any = import_module("transformers")
        self._transformers.utils.logging.disable_progress_bar()
        self._transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(workload.threads)

    def variants(self) -> Sequence[str]:
        """How it can be computed: wholly in a dtype, or in bfloat16 under autocast with float32 adapters."""
        return ("bfloat16", "bfloat16 autocast", "float32")

    def measure(self, case: TrainingCase, variant: str, seed: int, steps: int) -> Measurement:
        """Some steps of a fresh LoRA on a fresh copy of the base."""
        rows = [
            {"input_ids": ids, "labels": [-100] * first + ids[first:]}
            for ids, first in self._workload.rows(case, seed, steps)
        ]
        clock, pad = _clock(self._transformers), _Padding()
        with TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self._transformers.Trainer(
                model=self._model(variant, case.checkpointing, seed),
                args=self._arguments(case, variant, directory, steps),
                train_dataset=rows,
                data_collator=pad,
                callbacks=[clock],
            )
            trainer.remove_callback(self._transformers.PrinterCallback)
            trainer.train()
        return _measurement(pad.tokens[: len(clock.ends_s) - 1], clock.ends_s)

    def _arguments(self, case: TrainingCase, variant: str, directory: str, steps: int) -> Any:
        return self._transformers.TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=self._workload.batch_size,
            max_steps=steps + 1,
            learning_rate=self._workload.learning_rate,
            lr_scheduler_type="constant",
            gradient_checkpointing=case.checkpointing,
            bf16=variant.endswith("autocast"),
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )

    def _model(self, variant: str, checkpointing: bool, seed: int) -> Any:
        base = load_nf4(self._workload.directory, _DTYPES[variant.split()[0]])
        peft: Any = import_module("peft")
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=self._workload.rank,
            lora_alpha=self._workload.alpha,
            target_modules=ALL_LINEARS,
            task_type="CAUSAL_LM",
        )
        # In bfloat16 without autocast, adapters of the same dtype spare it conversions.
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=variant != "bfloat16")
        if checkpointing:
            model.enable_input_require_grads()
        _never_pack(model)
        return model


def _never_pack(model: Any) -> None:
    """Keep bitsandbytes from repacking weights for inference, behind which no gradient reaches the input."""
    linear_type = import_module("bitsandbytes").nn.Linear4bit
    for module in model.modules():
        if isinstance(module, linear_type):
            module.support_avx512bf16_for_cpu = False


class _Padding:
    """Rows as a batch, padded to the longest; counts their tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Input ids, labels and mask, [B, T]."""
        lengths = [len(row["input_ids"]) for row in rows]
        self.tokens.append(sum(lengths))
        longest = max(lengths)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

        mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": mask.long(),
        }


def _clock(transformers: Any) -> Any:
    """A callback that notes when steps end."""

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends_s: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends_s.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends_s.append(time.perf_counter())

    return Clock()


def _measurement(tokens: list[int], ends_s: list[float]) -> Measurement:
    times_s = [end - begin for begin, end in pairwise(ends_s)]
    return Measurement({"tokens_per_s": tokens_per_s(tokens, times_s)}, {"step": times_s})
