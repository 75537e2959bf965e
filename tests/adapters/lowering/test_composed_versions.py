"""Tasks made of several artifacts, from registration to the adapter that the engine gets."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterNoEffectError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    BaseMismatchError,
    DataLossError,
    DigestMismatchError,
    RequestIdReusedError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import composed_digest
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_ia3, make_lora
from support.factories.prefixes import make_prefix, make_prompt, tiny_model
from support.factories.registrations import nobody
from support.oracles.primitives import describe_model, logits_with

TOKENS = [1, 5, 9, 33, 2, 60, 17, 8, 41]
MODEL = tiny_model()
BASE = describe_model(MODEL)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Adapters of MODEL: LoRAs of ranks 2 and 3, virtual tokens of two kinds, and IA3."""
    root = tmp_path / "sources"
    make_lora(root / "two", BASE, rank=2, sites=["q_proj", "up_proj"], seed=1)
    make_lora(root / "three", BASE, rank=3, sites=["q_proj", "down_proj"], seed=2)
    make_prompt(root / "prompt", BASE)
    make_prefix(root / "prefix", BASE)
    make_ia3(root / "ia3", BASE)
    return root


@pytest.fixture
def store(tmp_path: Path, sources: Path) -> Iterator[AdapterStore]:
    store = open_store(tmp_path / "store", BASE, [sources])
    yield store
    store.close()


def published(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "store" / "artifacts"))


def parts_of(*parts: str | tuple[str, float]) -> list[Part]:
    return [Part(part) if isinstance(part, str) else Part(*part) for part in parts]


def merged(store: AdapterStore, *loras: tuple[str, float]) -> object:
    """MODEL with weighted LoRAs added to its weights, which is what they mean."""
    model = copy.deepcopy(MODEL)
    for uri, weight in loras:
        (artifact,) = store.load(store.register(Registration("plain", Uri(uri))).record).artifacts
        factor = weight * artifact.config["lora_alpha"] / artifact.config["r"]
        for name, a in artifact.tensors.items():
            if "lora_A" in name:
                b = artifact.tensors[name.replace("lora_A", "lora_B")]
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(path).weight.data += factor * b @ a
    return model


def logits(lowered: LoweredAdapter, model: object = MODEL) -> Tensor:
    return logits_with(model, lowered, TOKENS)


def prefix_alone(store: AdapterStore, uri: str) -> LoweredAdapter:
    return store.lower(store.register(Registration("plain", Uri(uri))).record)


@pytest.mark.parametrize("virtual", ["prompt", "prefix"])
def test_a_composed_task_is_its_parts_together(store: AdapterStore, virtual: str) -> None:
    parts = parts_of(("two", 0.5), virtual, ("three", -1.25))
    record = store.register(Registration("fr", Parts(parts))).record
    expected = logits(prefix_alone(store, virtual), merged(store, ("two", 0.5), ("three", -1.25)))
    torch.testing.assert_close(logits(store.lower(record)), expected, atol=2e-4, rtol=1e-4)


def test_its_record_names_the_parts_and_sums_their_sizes(store: AdapterStore, tmp_path: Path) -> None:
    plain = [store.register(Registration("plain", Uri(uri))).record for uri in ("two", "three")]
    record = store.register(Registration("fr", Parts(parts_of(("two", 0.5), "three")))).record
    assert (record.name, record.method) == ("fr@1", AdapterMethod.COMPOSED)
    assert [(part.digest, part.weight, part.source) for part in record.parts] == [
        (plain[0].digest, 0.5, "two"),
        (plain[1].digest, 1.0, "three"),
    ]
    assert record.digest == composed_digest([(plain[0].digest, 0.5), (plain[1].digest, 1.0)])
    assert record.digest == store.lower(record).digest
    assert record.size_bytes == sum(each.size_bytes for each in plain)
    assert record.num_parameters == sum(each.num_parameters for each in plain)
    assert record.base_model == "test/tiny"
    assert len(published(tmp_path)) == 2


def test_the_same_parts_in_another_order_are_the_same_version(store: AdapterStore) -> None:
    first = store.register(Registration("fr", Parts(parts_of(("two", 0.5), "three")))).record
    again = store.register(Registration("fr", Parts(parts_of("three", ("two", 0.5)))))
    assert (again.record, again.created) == (first, False)
    assert store.register(Registration("fr", Parts(parts_of("three", ("two", 0.75))))).record.version == 2


def test_one_artifact_may_be_two_parts(store: AdapterStore, tmp_path: Path) -> None:
    record = store.register(Registration("fr", Parts(parts_of(("two", 0.5), ("two", 0.25))))).record
    torch.testing.assert_close(
        logits(store.lower(record)), logits(LoweredAdapter("", ()), merged(store, ("two", 0.75)))
    )
    assert len(published(tmp_path)) == 1


def test_notes_say_which_part_they_are_about(tmp_path: Path, sources: Path) -> None:
    make_lora(sources / "unnamed", BASE, base_model_name_or_path="", seed=3, sites=["o_proj"])
    store = open_store(tmp_path / "store", BASE, [sources])
    record = store.register(Registration("fr", Parts(parts_of("two", "unnamed")))).record
    (note,) = record.notes
    assert note.startswith("parts[1]: ")
    store.close()


def test_bytes_stay_while_any_version_needs_them(store: AdapterStore, tmp_path: Path) -> None:
    store.register(Registration("plain", Uri("two")))
    composed = store.register(Registration("fr", Parts(parts_of("two", "three")))).record
    store.delete("plain", in_use=nobody)
    assert len(published(tmp_path)) == 2
    assert store.lower(composed).digest == composed.digest
    plain = store.register(Registration("plain", Uri("three"))).record
    store.delete("fr", in_use=nobody)
    assert len(published(tmp_path)) == 1
    assert store.lower(plain).digest == plain.digest


def test_expected_digests_request_ids_and_validation_work_as_for_plain_ones(
    store: AdapterStore, tmp_path: Path
) -> None:
    parts = parts_of("two", "three")
    checked = store.register(Registration("fr", Parts(parts), validate_only=True)).record
    assert (checked.version, published(tmp_path)) == (0, set())
    with pytest.raises(DigestMismatchError):
        store.register(Registration("fr", Parts(parts), expected_digest="sha256:" + "0" * 64))
    first = store.register(Registration("fr", Parts(parts), expected_digest=checked.digest, request_id="r"))
    assert (
        store.register(Registration("fr", Parts(parts), expected_digest=checked.digest, request_id="r"))
        == first
    )
    for other in (parts_of("two", ("three", 2.0)), parts_of("two"), parts_of("three", "two")):
        with pytest.raises(RequestIdReusedError):
            store.register(Registration("fr", Parts(other), expected_digest=checked.digest, request_id="r"))


@pytest.mark.parametrize(
    ("source", "subject"), [(Uri(""), "uri"), (Parts([]), "uri"), (Parts([Part("two")] * 17), "parts")]
)
def test_a_version_is_one_uri_or_a_few_parts(store: AdapterStore, source: Uri | Parts, subject: str) -> None:
    with pytest.raises(ArgumentInvalidError) as caught:
        store.register(Registration("fr", source))
    assert caught.value.subject == subject


def test_the_fault_of_a_part_is_named_with_it(store: AdapterStore, sources: Path) -> None:
    make_lora(sources / "elsewhere", BASE, base_model_name_or_path="org/other")
    (make_lora(sources / "broken", BASE) / "adapter_config.json").write_text("{")
    cases: list[tuple[list[Part], type[Exception], str]] = [
        (parts_of("two", "nothing"), SourceNotFoundError, "parts[1].uri"),
        (parts_of("two", "/etc"), SourceNotAllowedError, "parts[1].uri"),
        (parts_of("two", ""), SourceNotFoundError, "parts[1].uri"),
        (parts_of("broken", "two"), AdapterInvalidError, "parts[0] adapter_config.json"),
        (parts_of("two", "elsewhere"), BaseMismatchError, "parts[1] base_model_name_or_path"),
        (parts_of("two", "prefix", "prompt"), AdapterUnsupportedError, "parts[2]"),
        (parts_of("ia3", ("two", 0.5), "three"), AdapterUnsupportedError, "parts[2]"),
        (parts_of("two", ("three", 0.0)), AdapterInvalidError, "parts[1]"),
        (parts_of("two", ("three", float("nan"))), AdapterInvalidError, "parts[1]"),
        (parts_of("two", ("prompt", 0.5)), AdapterUnsupportedError, "parts[1]"),
    ]
    for parts, error, subject in cases:
        with pytest.raises(error) as caught:
            store.register(Registration("fr", Parts(parts)))
        assert getattr(caught.value, "subject", "") == subject
    assert store.list().records == ()


def test_a_low_rank_delta_beside_a_rescaling_is_refused_with_the_reason(store: AdapterStore) -> None:
    with pytest.raises(AdapterUnsupportedError, match="no training library defines"):
        store.register(Registration("fr", Parts(parts_of("ia3", "three"))))


def test_parts_that_cancel_out_change_nothing(store: AdapterStore) -> None:
    # Low ranks are concatenated, not subtracted, so this takes one place of one part after the other.
    with pytest.raises(AdapterNoEffectError):
        store.register(
            Registration("fr", Parts(parts_of(("two", 1.0), ("two", -1.0)))), probe=lambda lowered: 0.0
        )


def test_parts_share_one_limit_of_size(tmp_path: Path, sources: Path) -> None:
    size = sum(file.stat().st_size for file in (sources / "two").iterdir())
    store = open_store(tmp_path / "store", BASE, [sources], limits=AdapterLimits(max_size_bytes=2 * size))
    assert store.register(Registration("fr", Parts(parts_of("two", ("two", 0.5))))).created
    with pytest.raises(AdapterTooLargeError) as caught:
        store.register(Registration("fr", Parts(parts_of("two", "three"))))
    assert caught.value.subject == "parts[1]"
    store.close()


def test_a_damaged_part_is_the_versions_loss(store: AdapterStore, tmp_path: Path) -> None:
    record = store.register(Registration("fr", Parts(parts_of("two", "three")))).record
    (file,) = (tmp_path / "store" / "artifacts").glob(f"{record.parts[1].digest[7:]}/*.safetensors")
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataLossError) as caught:
        store.lower(record)
    assert caught.value.subject == "fr@1"


def test_another_base_is_told_when_a_version_is_loaded(tmp_path: Path, sources: Path) -> None:
    store = open_store(tmp_path / "store", BASE, [sources])
    records = [
        store.register(Registration("plain", Uri("two"))).record,
        store.register(Registration("fr", Parts(parts_of("two", "prompt")))).record,
    ]
    store.close()
    others: list[BaseDescription] = [
        describe_model(tiny_model(hidden_size=64), names=("test/tiny",)),
        replace(describe_model(MODEL, names=("org/other",)), digest="sha256:" + "1" * 64),
    ]
    for base in others:
        reopened = open_store(tmp_path / "store", base, [sources])
        assert [record.digest for record in reopened.list().records] == [r.digest for r in records[::-1]]
        for record in records:
            with pytest.raises((BaseMismatchError, AdapterInvalidError, AdapterUnsupportedError)):
                reopened.lower(record)
        reopened.close()


def test_a_plain_version_is_lowered_as_its_artifact_is(store: AdapterStore) -> None:
    record = store.register(Registration("plain", Uri("two"))).record
    (artifact,) = store.load(record).artifacts
    torch.testing.assert_close(logits(store.lower(record)), logits(lower(artifact, BASE)), atol=0, rtol=0)
