from __future__ import annotations

import time
from typing import Any

import pytest

from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import save_tokenizer
from support.harnesses.backends import default_model
from support.harnesses.engine_loop import Loop


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny models' own."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return Tokenizer.from_directory(directory)


@pytest.fixture
def loop(tokenizer: Tokenizer) -> Loop:
    """An engine's loop that is turned by the test itself."""
    return Loop(tokenizer)


@pytest.fixture
def steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes 10 ms at least, so that there is time to do something between two."""
    forward = default_model().forward

    def slow(*args: Any) -> Any:
        time.sleep(0.01)
        return forward(*args)

    monkeypatch.setattr(default_model(), "forward", slow)
