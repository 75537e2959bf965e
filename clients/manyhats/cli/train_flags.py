"""The settings of ``manyhats train`` as given on its command line, and the server to register with."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manyhats.cli import options
from manyhats.cli import train_options as opt
from manyhats.cli.address import check_address
from manyhats.cli.connection import Connection
from manyhats.cli.failures import UsageError
from manyhats.cli.pairs import as_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """A setting each, by its name in the trainer's ``settings_file``; None is not given."""

    task: opt.Task = None
    out: opt.Out = None
    save_dtype: opt.SaveDtype = None
    init_from: opt.InitFrom = None

    data: opt.Data = None
    eval: opt.Eval = None
    chat: opt.Chat = None
    system: opt.System = None
    labels: opt.Labels = None
    max_length: opt.MaxLength = None
    overlong: opt.Overlong = None
    shuffle: opt.Shuffle = None
    max_train_rows: opt.MaxTrainRows = None
    max_eval_rows: opt.MaxEvalRows = None
    ignore_fields: opt.IgnoreFields = None

    rank: opt.Rank = None
    alpha: opt.Alpha = None
    target_modules: opt.TargetModules = None
    dropout: opt.Dropout = None
    use_rslora: opt.UseRslora = None
    rank_pattern: opt.RankPattern = None
    alpha_pattern: opt.AlphaPattern = None
    lora_plus_ratio: opt.LoraPlusRatio = None
    output_modules: opt.OutputModules = None
    input_modules: opt.InputModules = None
    variant: opt.Variant = None
    reduction_factor: opt.ReductionFactor = None
    non_linearity: opt.NonLinearity = None
    scaling: opt.Scaling = None
    num_virtual_tokens: opt.NumVirtualTokens = None
    projection_size: opt.ProjectionSize = None
    init: opt.Init = None
    init_text: opt.InitText = None
    encoder_size: opt.EncoderSize = None

    model: opt.Model = None
    quantization: opt.Quantization = None
    dtype: opt.Dtype = None
    device: opt.Device = None
    gradient_checkpointing: opt.GradientCheckpointing = None
    num_threads: opt.NumThreads = None

    batch_size: opt.BatchSize = None
    batch_tokens: opt.BatchTokens = None
    gradient_accumulation: opt.GradientAccumulation = None
    epochs: opt.Epochs = None
    max_steps: opt.MaxSteps = None
    learning_rate: opt.LearningRate = None
    schedule: opt.Schedule = None
    warmup_steps: opt.WarmupSteps = None
    optimizer: opt.Optimizer = None
    weight_decay: opt.WeightDecay = None
    beta1: opt.Beta1 = None
    beta2: opt.Beta2 = None
    max_grad_norm: opt.MaxGradNorm = None
    seed: opt.Seed = None
    eval_steps: opt.EvalSteps = None
    patience: opt.Patience = None
    checkpoint_steps: opt.CheckpointSteps = None
    keep_checkpoints: opt.KeepCheckpoints = None

    def given(self) -> dict[str, Any]:
        """The settings that are given, patterns as mappings.

        Raises:
            UsageError: a pattern is not ``NAME=NUMBER``.
        """
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        given = {name: value for name, value in values.items() if value not in (None, [])}
        for name in ("rank_pattern", "alpha_pattern"):
            if name in given:
                given[name] = parse_pattern(f"--{name.replace('_', '-')}", given[name])
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The server that artifacts are registered with, and how it is reached."""

    register: opt.Register = None
    no_activate: opt.NoActivate = False
    activate_if: opt.ActivateIf = None
    timeout: opt.RegisterTimeout = None
    tls: options.Tls = False
    tls_ca: options.TlsCa = None
    tls_cert: options.TlsCert = None
    tls_key: options.TlsKey = None
    token: options.Token = None
    token_in_clear: options.TokenInClear = False

    @property
    def connection(self) -> Connection | None:
        """None where nothing is registered.

        Raises:
            UsageError: the address is none, or flags about activation that do not go together.
        """
        if self.register is None:
            for flag, is_given in (("--no-activate", self.no_activate), ("--activate-if", self.activate_if)):
                if is_given:
                    raise UsageError(f"{flag} needs --register HOST:PORT: nothing is activated without it")
            return None
        if self.no_activate and self.activate_if is not None:
            raise UsageError("--no-activate and --activate-if contradict each other")
        return Connection(
            server=check_address("--register", self.register),
            timeout=self.timeout,
            tls=self.tls,
            tls_ca=self.tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            token=self.token,
            token_in_clear=self.token_in_clear,
        )


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of ``Flags`` and ``Server`` as options, in place of its ``flags`` and ``server``."""
    groups: dict[str, type[Flags] | type[Server]] = {"flags": Flags, "server": Server}

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            of_group = {each.name: values.pop(each.name) for each in dataclasses.fields(group)}
            values[name] = group(**of_group)
        command(**values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        group = groups.get(name)
        taken = [parameter] if group is None else inspect.signature(group, eval_str=True).parameters.values()
        parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in taken]
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded


def parse_pattern(flag: str, texts: list[str]) -> dict[str, str]:
    """``NAME=NUMBER`` texts as a mapping; the numbers are read where all settings are.

    Raises:
        UsageError: one is not of that form, or a name comes twice.
    """
    return as_mapping(flag, "NAME=NUMBER", (text.rpartition("=") for text in texts))
