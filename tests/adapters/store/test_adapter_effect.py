"""What registration asks of the engine: how far an adapter moves the logits, and that it is loaded in time."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterNoEffectError,
    DigestMismatchError,
    TaskNotFoundError,
)
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.registration import Files, Part, Parts, Registration, Uri
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base, make_ia3
from support.factories.registrations import nobody
from support.factories.uploads import announced, content_of, send


def published(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "store" / "artifacts")


def test_the_effect_is_measured_on_the_lowered_adapter_and_recorded(store: AdapterStore) -> None:
    seen: list[LoweredAdapter] = []

    def probe(lowered: LoweredAdapter) -> float:
        seen.append(lowered)
        return 0.25

    record = store.register(Registration("fr", Uri("a0")), probe=probe).record
    assert (record.effect, seen[0].digest, len(seen[0].deltas)) == (0.25, record.digest, 4)
    composed = store.register(Registration("fr", Parts([Part("a0"), Part("a1")])), probe=probe).record
    assert (composed.effect, seen[1].digest) == (0.25, composed.digest)
    assert store.get("fr").effect == 0.25
    assert (
        store.register(Registration("de", Uri("a0"), validate_only=True), probe=probe).record.effect == 0.25
    )
    assert store.register(Registration("it", Uri("a1"))).record.effect is None


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("effect", "error"),
    [
        (0.0, AdapterNoEffectError),
        (math.nan, AdapterInvalidError),
        (math.inf, AdapterInvalidError),
    ],
)
def test_an_adapter_that_moves_nothing_or_breaks_the_logits_is_refused(
    store: AdapterStore,
    sources: Path,
    tmp_path: Path,
    effect: float,
    error: type[Exception],
    validate_only: bool,
) -> None:
    def probe(lowered: LoweredAdapter) -> float:
        return effect

    for source in (Uri("a0"), Parts([Part("a0"), Part("a1")])):
        with pytest.raises(error):
            store.register(Registration("fr", source, validate_only=validate_only), probe=probe)
    session = store.open_upload(
        Registration("fr", Files(announced(content_of(sources / "a0"))), validate_only=validate_only)
    )
    for index, data in enumerate(content_of(sources / "a0").values()):
        session.write(index, 0, data)
    with pytest.raises(error):
        session.finish(probe=probe)
    assert published(tmp_path) == []
    assert store.list().records == ()


def test_what_the_probe_raises_is_what_registration_raises(store: AdapterStore, tmp_path: Path) -> None:
    def probe(lowered: LoweredAdapter) -> float:
        raise AdapterInvalidError("logits", "are not finite")

    with pytest.raises(AdapterInvalidError, match="logits"):
        store.register(Registration("fr", Uri("a0")), probe=probe)
    assert published(tmp_path) == []


def test_the_store_answers_while_an_adapter_is_probed(store: AdapterStore) -> None:
    store.register(Registration("de", Uri("a1")))
    store.register(Registration("de", Uri("a2")))

    def probe(lowered: LoweredAdapter) -> float:
        with ThreadPoolExecutor(1) as other:
            assert other.submit(store.resolve, "de").result(timeout=30).version == 2
            assert other.submit(store.activate, "de@1").result(timeout=30).version == 1
            assert other.submit(store.lower, store.get("de")).result(timeout=30).deltas
            assert other.submit(store.delete, "de@2", in_use=nobody).result(timeout=30)
        return 1.0

    assert store.register(Registration("fr", Uri("a0")), probe=probe).created


def test_nothing_is_probed_that_is_refused_anyway(store: AdapterStore) -> None:
    def never(lowered: LoweredAdapter) -> float:
        raise AssertionError("it was probed")

    with pytest.raises(DigestMismatchError):
        store.register(Registration("fr", Uri("a0"), expected_digest="sha256:" + "0" * 64), probe=never)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_named(store: AdapterStore, sources: Path, value: float) -> None:
    file = sources / "a0" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(AdapterInvalidError) as caught:
        store.register(Registration("fr", Uri("a0")))
    assert caught.value.subject == name


def test_constants_that_overflow_together_are_named_by_their_place(
    store: AdapterStore, sources: Path
) -> None:
    file = make_ia3(sources / "ia3", make_base(names=("org/tiny",)), sites=["k_proj"], layers=[1])
    tensors = {name: 1e30 * tensor for name, tensor in load_file(file / "adapter_model.safetensors").items()}
    save_file(tensors, file / "adapter_model.safetensors")
    store.register(Registration("fr", Uri("ia3")))
    with pytest.raises(AdapterInvalidError, match="not finite") as caught:
        store.register(Registration("fr", Parts([Part("ia3"), Part("ia3")])))
    assert caught.value.subject == "layer 1 k_proj"


def test_a_version_is_prepared_when_its_bytes_are_there_and_its_row_is_not(store: AdapterStore) -> None:
    seen: list[str] = []

    def prepare(record: AdapterRecord, lowered: LoweredAdapter) -> None:
        assert store.lower(record).digest == record.digest == lowered.digest
        with pytest.raises(TaskNotFoundError):
            store.get("fr")
        seen.append(record.digest)

    record = store.register(Registration("fr", Uri("a0")), prepare=prepare).record
    assert seen == [record.digest]


def test_only_what_becomes_active_is_prepared(store: AdapterStore, sources: Path) -> None:
    def never(record: AdapterRecord, lowered: LoweredAdapter) -> None:
        raise AssertionError("it was prepared")

    store.register(Registration("fr", Uri("a0"), validate_only=True), prepare=never)
    store.register(Registration("fr", Uri("a1"), activate=False), prepare=never)
    send(store, "de", content_of(sources / "a0"), activate=False, prepare=never)


def test_a_failure_to_prepare_publishes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    def prepare(record: AdapterRecord, lowered: LoweredAdapter) -> None:
        raise AdapterInvalidError("q_proj", "cannot be loaded")

    with pytest.raises(AdapterInvalidError):
        store.register(Registration("fr", Uri("a0")), prepare=prepare)
    assert published(tmp_path) == []
    assert store.list().records == ()
