"""How long steps and loads take on a machine: formulas fitted to what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.engine.scheduling.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Seconds and bytes of a model on a machine.

    The defaults are the default model with LoRAs of rank 16 on all linears, on two cores of an AMD EPYC with AVX-512
    (docs/benchmarks.md). Against what was measured there: a decode step of 1, 8, 32 and 128 sequences behind 128 tokens
    +1, +8, −4 and +1 %, of 32 over as many LoRAs −4 %, of 32 behind 4,096 tokens −2 %, a prompt of 128 tokens −8 %, of
    2,048 −3 %.

    Attributes:
        step_s: of any step.
        row_s: of each token of it.
        choice_s: of each token chosen.
        decode_position_s: of each position that a decode attends to.
        prompt_position_s: the same of a prompt's token, which shares what is read with others.
        adapter_s: of each adapter in a step.
        load_s: of an adapter, from disk to host memory; two at a time take as long each.
        adapter_bytes: of one in host memory.
        kv_token_bytes: of a token's keys and values.
    """

    step_s: float = 2.9e-3
    row_s: float = 0.31e-3
    choice_s: float = 0.10e-3
    decode_position_s: float = 0.98e-6
    prompt_position_s: float = 0.30e-6
    adapter_s: float = 0.226e-3
    load_s: float = 60e-3
    adapter_bytes: int = 9_764_864
    kv_token_bytes: int = 23_040

    def step(self, schedule: Schedule) -> float:
        """Seconds that a step takes."""
        num_rows = num_chosen = 0
        positions_s = 0.0
        slots = set()
        for chunk in schedule.chunks:
            num_rows += chunk.num_rows
            num_chosen += chunk.ends_tokens
            slots.add(chunk.sequence.slot)
            if chunk.is_decode:
                positions_s += chunk.end * self.decode_position_s
            else:
                num_attended = chunk.num_tokens * (chunk.start + chunk.end + 1) / 2
                positions_s += num_attended * self.prompt_position_s
        return (
            self.step_s
            + num_rows * self.row_s
            + num_chosen * self.choice_s
            + positions_s
            + len(slots - {0}) * self.adapter_s
        )
