"""How large everything is: on a GPU that of an 8B model, under ``--cpu`` just large enough for every part to run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a Llama of random weights."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input features of the NF4 linears: side by side as the engine multiplies them, and one by one."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (query + 2 * key, hidden),
            "o": (hidden, query),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
            "q": (query, hidden),
            "k": (key, hidden),
            "gate": (inner, hidden),
        }

    @property
    def distinct_linears(self) -> dict[str, tuple[int, int]]:
        """The same, each shape once, under the first of its names."""
        first = {shape: name for name, shape in reversed(self.linears.items())}
        return {name: shape for name, shape in self.linears.items() if first[shape] == name}


LLAMA_8B = Shape(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    context=32768,
)
TINY = Shape(
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=64,
    vocab_size=128,
    context=512,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What the parts run on.

    Attributes:
        device: ``cuda`` or ``cpu``.
        shape: of the model, whose linears are the ones measured.
        repeats: of a measurement, whose median is taken.
        calls: of a small kernel, that are timed together.
        copy_bytes: of the copy that gives the ceiling of bandwidth.
        product: side of the product that gives the ceiling of arithmetic.
        linear_rows: numbers of rows of linears that are timed.
        bit_rows: numbers of rows among which a row must keep its bits.
        rotated_bytes: weights that are read in turn, so that none is in a cache.
        contexts: (rows, positions) of decodes whose attention is timed.
        prefills: lengths of prompts whose attention is timed.
        adapter_counts: distinct adapters whose deltas are timed.
        ranks: of these.
        decode_rows: of steps of the engine.
        step_adapters: distinct adapters in them.
        step_context: positions behind which they decode.
        num_steps: decode steps of one measurement.
        num_warm: steps before them; a GPU's second one of a kind is recorded as a graph.
        step_prompts: lengths of prompts.
        max_rows: of a step.
        rank: of the engine's adapters, on all linears.
        num_streams: that decode while an adapter is loaded.
        peer_steps: tokens of each of transformers' and PEFT's answers.
        num_peer_adapters: between which PEFT switches.
        train_rows: (rows, tokens) of a step of training.
        train_steps: of each optimizer.
    """

    device: str
    shape: Shape
    repeats: int
    calls: int
    copy_bytes: int
    product: int
    linear_rows: tuple[int, ...]
    bit_rows: tuple[int, ...]
    rotated_bytes: int
    contexts: tuple[tuple[int, int], ...]
    prefills: tuple[int, ...]
    adapter_counts: tuple[int, ...]
    ranks: tuple[int, ...]
    decode_rows: tuple[int, ...]
    step_adapters: tuple[int, ...]
    step_context: int
    num_steps: int
    num_warm: int
    step_prompts: tuple[int, ...]
    max_rows: int
    rank: int
    num_streams: int
    peer_steps: int
    num_peer_adapters: int
    train_rows: tuple[int, int]
    train_steps: int

    @property
    def is_gpu(self) -> bool:
        """Whether its times mean anything."""
        return self.device == "cuda"


GPU = Scale(
    device="cuda",
    shape=LLAMA_8B,
    repeats=3,
    calls=20,
    copy_bytes=4 << 30,
    product=8192,
    linear_rows=(1, 4, 8, 16, 32, 64, 128, 512, 2048),
    bit_rows=(1, 2, 8, 16, 17, 64, 255, 2048),
    rotated_bytes=128 << 20,
    contexts=tuple((rows, length) for rows in (1, 32, 128) for length in (1024, 8192, 32768)),
    prefills=(2048, 8192),
    adapter_counts=(1, 8, 32, 64),
    ranks=(8, 16, 64, 256),
    decode_rows=(1, 8, 32, 64, 128),
    step_adapters=(0, 1, 8, 32, 64),
    step_context=512,
    num_steps=12,
    num_warm=3,
    step_prompts=(512, 2048, 8192),
    max_rows=2048,
    rank=16,
    num_streams=32,
    peer_steps=24,
    num_peer_adapters=8,
    train_rows=(4, 512),
    train_steps=6,
)
CPU = Scale(
    device="cpu",
    shape=TINY,
    repeats=1,
    calls=1,
    copy_bytes=1 << 20,
    product=64,
    linear_rows=(1, 17),
    bit_rows=(1, 2, 17, 65),
    rotated_bytes=0,
    contexts=((2, 40),),
    prefills=(20,),
    adapter_counts=(2,),
    ranks=(8,),
    decode_rows=(1, 3),
    step_adapters=(0, 2),
    step_context=6,
    num_steps=1,
    num_warm=0,
    step_prompts=(8,),
    max_rows=16,
    rank=4,
    num_streams=2,
    peer_steps=2,
    num_peer_adapters=2,
    train_rows=(2, 8),
    train_steps=4,
)
