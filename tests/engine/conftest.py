from __future__ import annotations

import pytest

from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import save_tokenizer
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
