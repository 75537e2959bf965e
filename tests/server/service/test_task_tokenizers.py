"""Tokenizers of tasks, read once for all whose files mean the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import TaskNotFoundError
from manyhats.engine.text.task_text import TaskTexts
from manyhats.engine.text.text_process import TextProcesses
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.server.service.task_tokenizers import TaskTokenizers
from support.factories.tiny_models import save_tokenizer
from support.fakes.server import make_record

FILES: Mapping[str, bytes] = {"chat_template.jinja": b"{{ messages[0].content }}!"}


@pytest.fixture
def texts(tmp_path: Path) -> Iterator[TaskTexts]:
    save_tokenizer(tmp_path)
    processes = TextProcesses()
    yield TaskTexts(Tokenizer.from_directory(tmp_path), processes)
    processes.close()


@pytest.mark.parametrize("num_gone", [1, 2, 3])
async def test_a_version_deleted_meanwhile_fails_none_whose_files_mean_the_same(
    texts: TaskTexts, num_gone: int
) -> None:
    may_read = threading.Event()

    def read_text(record: AdapterRecord) -> Sequence[Mapping[str, bytes]]:
        assert may_read.wait(10)
        if record.task_id.startswith("gone"):
            raise TaskNotFoundError(record.name, "does not exist")
        return [FILES]

    tokenizers = TaskTokenizers(texts, read_text)
    names = [*(f"gone{n}" for n in range(num_gone)), "here", "here-too"]
    records = [replace(make_record(name), text="the same") for name in names]
    calls = [asyncio.ensure_future(tokenizers.of(record)) for record in records]
    await asyncio.sleep(0)
    may_read.set()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in found[:num_gone]] == [TaskNotFoundError] * num_gone
    assert found[-1] is found[-2]
    assert isinstance(found[-1], Tokenizer)
    assert found[-1].chat_template == FILES["chat_template.jinja"].decode()
