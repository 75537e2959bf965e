"""An adapter that names another base, registered and uploaded over a real port by callers who know better."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyhats.adapters.store.opening import open_store
from manyhats.client import AsyncClient, BaseMismatchError
from support.factories.adapters import make_base, make_lora
from support.fakes.server import running_server

BASE = make_base(names=("org/tiny",))


async def test_register_and_upload_take_the_servers_base_for_the_adapters_where_the_caller_says_so(
    tmp_path: Path,
) -> None:
    make_lora(tmp_path / "root" / "a", BASE, base_model_name_or_path="other/large")
    store = open_store(tmp_path / "store", BASE, [tmp_path / "root"])
    async with (
        running_server(store=store) as server,
        AsyncClient(server.port.address) as client,
    ):
        with pytest.raises(BaseMismatchError, match="assume_base"):
            await client.register_adapter("one", "a")
        with pytest.raises(BaseMismatchError, match="assume_base"):
            await client.upload_adapter("two", tmp_path / "root" / "a", assume_base=False)
        registered = await client.register_adapter("one", "a", assume_base=True)
        uploaded = await client.upload_adapter("two", tmp_path / "root" / "a", assume_base=True)
        for made in (registered.adapter, uploaded.adapter):
            assert made.base_model == "other/large"
            assert "assume_base" in made.notes[0]
    store.close()
