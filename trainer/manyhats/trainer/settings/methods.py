"""Each method's own settings, one dataclass for each kind of adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import AdapterError
from manyhats.settings.declaration import setting
from manyhats.settings.reading import check
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.declaring import (
    BOTTLENECK,
    IA3,
    LARGEST,
    LORA,
    VIRTUAL,
    WORDING,
    require,
    whole,
)

_MAX_SCALING = 1e6
ALL_LINEARS = "all-linear"
"""PEFT's word for every linear but the head."""


def _num_virtual_tokens() -> Any:
    return whole(16, 1, group=VIRTUAL, metavar="P", help="Virtual tokens before the prompt.")


def _check_activation(name: str) -> None:
    from manyhats.adapters.activations import activation_name

    try:
        activation_name("non_linearity", name)
    except AdapterError as error:
        raise SettingError("non_linearity", error.description) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """LoRA, or DoRA with ``use_dora``. A pattern's key is a module's full name or its end, or a regex of these.

    Source: Hu et al. 2021 (arXiv:2106.09685); Liu et al. 2024 (arXiv:2402.09353); Kalajdzievski 2023
    (arXiv:2312.03732); Hayou et al. 2024 (arXiv:2402.12354).
    """

    rank: int = whole(16, 1, group=LORA, metavar="R", help="Rank of the deltas.")
    alpha: float = setting(32.0, above=0, group=LORA, metavar="A", help="Deltas are scaled by A / R.")
    target_modules: tuple[str, ...] = setting(
        (ALL_LINEARS,),
        group=LORA,
        flag="target_module",
        metavar="NAME",
        shown="all linears of the layers",
        help="A linear to adapt, such as q_proj or lm_head. Repeatable.",
    )
    dropout: float = setting(
        0.0, at_least=0, below=1, group=LORA, metavar="P", help="Dropout of the deltas' input."
    )
    use_rslora: bool = setting(False, group=LORA, help="Scale by A / √R instead.")
    use_dora: bool = False
    rank_pattern: dict[str, int] = setting(
        factory=dict,
        group=LORA,
        metavar="NAME=NUMBER",
        help="A module's own rank; NAME may be a regex. Repeatable.",
    )
    alpha_pattern: dict[str, float] = setting(
        factory=dict,
        group=LORA,
        metavar="NAME=NUMBER",
        help="A module's own alpha; NAME may be a regex. Repeatable.",
    )
    lora_plus_ratio: float = setting(
        1.0, at_least=1, group=LORA, help="LoRA+: B learns this many times faster."
    )

    def __post_init__(self) -> None:
        check(self, WORDING)
        require(bool(self.target_modules), "target_modules", "must name a module")
        require(
            all(rank >= 1 for rank in self.rank_pattern.values()), "rank_pattern", "ranks must be at least 1"
        )
        largest = max(self.rank_pattern.values(), default=1)
        require(largest <= LARGEST, "rank_pattern", f"ranks must be at most {LARGEST}")

    @property
    def method(self) -> AdapterMethod:
        """LORA or DORA."""
        return AdapterMethod.DORA if self.use_dora else AdapterMethod.LORA


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3Settings:
    """IA3: which linears' outputs are rescaled, and which linears' inputs. Source: arXiv:2205.05638."""

    output_modules: tuple[str, ...] = setting(
        ("k_proj", "v_proj"),
        group=IA3,
        flag="output_module",
        metavar="NAME",
        help="A linear whose output is rescaled. Repeatable.",
    )
    input_modules: tuple[str, ...] = setting(
        ("down_proj",),
        group=IA3,
        flag="input_module",
        metavar="NAME",
        help="A linear whose input is rescaled. Repeatable.",
    )
    method = AdapterMethod.IA3

    def __post_init__(self) -> None:
        both = set(self.output_modules) & set(self.input_modules)
        require(bool(self.output_modules or self.input_modules), "output_modules", "must name a module")
        require(not both, "input_modules", f"{', '.join(sorted(both))} is also in output_modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckSettings:
    """Bottleneck adapters of width ``D // reduction_factor``, in AdapterHub's layout.

    ``seq`` is Pfeiffer's, ``double_seq`` Houlsby's, ``parallel`` He et al.'s.
    """

    variant: Literal["seq", "double_seq", "parallel"] = setting(
        "seq",
        group=BOTTLENECK,
        help="Where they act: as in Pfeiffer, as in Houlsby, or parallel to the feed-forward.",
    )
    reduction_factor: int = whole(16, 1, group=BOTTLENECK, help="Hidden size over bottleneck size.")
    non_linearity: str = setting(
        "relu", group=BOTTLENECK, metavar="NAME", help="Activation between the down and up projections."
    )
    scaling: float | None = setting(
        None, group=BOTTLENECK, shown="1; 4 for parallel", help="Factor on the output."
    )
    method = AdapterMethod.BOTTLENECK

    def __post_init__(self) -> None:
        check(self, WORDING)
        _check_activation(self.non_linearity)
        require(
            self.scaling is None or 0 < abs(self.scaling) <= _MAX_SCALING,
            "scaling",
            f"must be nonzero, and at most {_MAX_SCALING:g} in magnitude",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSettings:
    """Prefix tuning of P virtual tokens; trained through an MLP of this hidden size (0 for none).

    Source: Li and Liang 2021 (arXiv:2101.00190).
    """

    num_virtual_tokens: int = _num_virtual_tokens()
    projection_size: int = whole(
        512, 0, group=VIRTUAL, help="prefix: hidden size of the MLP it is trained through; 0 for none."
    )
    method = AdapterMethod.PREFIX_TUNING

    def __post_init__(self) -> None:
        check(self, WORDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """Prompt tuning of P virtual tokens, initialized from a text's embeddings, the vocabulary's, or at random.

    Source: Lester et al. 2021 (arXiv:2104.08691).
    """

    num_virtual_tokens: int = _num_virtual_tokens()
    init: Literal["text", "vocabulary", "random"] = setting(
        "vocabulary", group=VIRTUAL, help="prompt: how the virtual tokens are initialized."
    )
    init_text: str = setting("", group=VIRTUAL, help="prompt: the text of --init text.")
    method = AdapterMethod.PROMPT_TUNING

    def __post_init__(self) -> None:
        check(self, WORDING)
        require(self.init != "text" or bool(self.init_text), "init_text", "must be given with init text")
        require(self.init == "text" or not self.init_text, "init_text", "only applies to init text")


@dataclass(frozen=True, slots=True, kw_only=True)
class PTuningSettings:
    """P-tuning: P virtual tokens, made in training by an MLP of this hidden size. Source: arXiv:2103.10385."""

    num_virtual_tokens: int = _num_virtual_tokens()
    encoder_size: int = whole(
        512, 1, group=VIRTUAL, help="ptuning: hidden size of the MLP that makes the virtual tokens."
    )
    method = AdapterMethod.P_TUNING

    def __post_init__(self) -> None:
        check(self, WORDING)


AdapterSettings = (
    LoraSettings | Ia3Settings | BottleneckSettings | PrefixSettings | PromptSettings | PTuningSettings
)
