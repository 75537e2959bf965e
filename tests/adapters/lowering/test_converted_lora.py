"""LoRA whose beginning changed the base, saved converted: plain LoRA of twice the rank, on the base as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from manyhats.adapters.errors import AdapterUnsupportedError
from manyhats.adapters.primitives import LowRank
from support.oracles.peft import IDS, base_logits, make_peft, read_lowered, save_peft, tiny_model
from support.oracles.primitives import describe_model, logits_with

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_converted_save_gives_peft_s_logits_and_a_plain_one_is_refused(start: Any, tmp_path: Path) -> None:
    model = tiny_model()
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], init_lora_weights=start)
    config.lora_alpha = 3
    initial = save_peft(make_peft(model, config, size=0.0), tmp_path / "initial")
    base = describe_model(model)
    with pytest.raises(AdapterUnsupportedError) as caught:
        read_lowered(initial, base)
    assert caught.value.subject == "init_lora_weights"
    trained = make_peft(model, config)
    with torch.no_grad():
        expected = trained(input_ids=torch.tensor([IDS])).logits[0]
    assert (expected - base_logits(model)).abs().max() > 1e-2
    save_peft(trained, tmp_path / "converted", path_initial_model_for_weight_conversion=str(initial))
    lowered = read_lowered(tmp_path / "converted", base)
    assert {delta.rank for delta in lowered.deltas if isinstance(delta, LowRank)} == {6}
    torch.testing.assert_close(logits_with(model, lowered, IDS), expected, atol=1e-4, rtol=1e-4)
