"""From the trainer's output to a server, over a real port."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import trustme

from manyhats.client import AdapterInvalidError, Credentials, UnavailableError
from manyhats.server.service.task_defaults import TaskDefaults, read_defaults
from manyhats.trainer.data.contents import PromptForm
from manyhats.trainer.errors import RegistrationError
from manyhats.trainer.registration import RegistrationServer, version_labels, why_no_classes
from manyhats.trainer.report.report import Evaluation, HeldOut
from support.fakes.client import FakeServer, make_status, running_server


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "sql"
    (directory / "training" / "checkpoints").mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (directory / "README.md").write_text("# sql")
    (directory / "training" / "report.json").write_text("{}")
    return directory


def test_the_artifact_alone_is_sent_and_becomes_active(fake: FakeServer, out: Path) -> None:
    told: list[tuple[int, int]] = []
    registration = RegistrationServer(target=fake.target).register(
        "sql", out, lambda sent, total: told.append((sent, total))
    )
    assert (registration.created, registration.adapter.name) == (True, "sql@3")
    assert (fake.last_request.task_id, fake.last_request.activate) == ("sql", True)
    assert set(fake.uploaded) == {"adapter_config.json", "adapter_model.safetensors"}
    assert bytes(fake.uploaded["adapter_model.safetensors"]) == b"weights" * 1000
    assert told[-1] == (7002, 7002)


def test_a_version_that_answers_with_labels_gets_defaults_for_that(fake: FakeServer, out: Path) -> None:
    held_out = HeldOut(loss=1.0, num_right=5)
    with_labels = Evaluation(num_items=9, labels=("a", "b"), before=held_out, after=held_out, label_tokens=3)
    labels = version_labels(with_labels)
    RegistrationServer(target=fake.target).register("sql", out, labels=labels)
    assert fake.last_request.labels == {"default.temperature": "0", "default.max_tokens": "3"}
    assert read_defaults(labels) == TaskDefaults({"temperature": 0.0}, {"max_new_tokens": 3})
    assert "several ways" in why_no_classes(with_labels)
    with_form = replace(with_labels, form=PromptForm(is_chat=True, system="Be brief."))
    classes = {"class.0": "a", "class.1": "b", "classify.system": "Be brief."}
    assert (version_labels(with_form), why_no_classes(with_form)) == (labels | classes, "")
    for unfit in (("a",), ("a", "b" * 257), ("a", "b\x1b")):
        without = replace(with_form, labels=unfit)
        assert version_labels(without) == labels
        assert why_no_classes(without).startswith("labels")
    assert version_labels(replace(with_labels, labels=())) == version_labels(None) == {}


def test_the_token_is_shown(fake: FakeServer, out: Path) -> None:
    server = RegistrationServer(target=fake.target, credentials=Credentials(token="secret"))
    server.info()
    server.register("sql", out)
    assert fake.authorizations == ["Bearer secret", "Bearer secret"]


def test_over_tls(out: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain = certificate.cert_chain_pems[0].bytes()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    with running_server(credentials) as fake:
        secure = RegistrationServer(
            target=fake.target, credentials=Credentials(ca_file=tmp_path / "ca.pem", token="secret")
        )
        assert secure.register("sql", out).created
        with pytest.raises(RegistrationError):
            RegistrationServer(target=fake.target, timeout_s=5).register("sql", out)


def test_a_server_that_is_not_there_leaves_the_artifact_and_says_where(out: Path) -> None:
    server = RegistrationServer(target="127.0.0.1:1", timeout_s=5)
    with pytest.raises(RegistrationError) as raised:
        server.register("sql", out)
    assert isinstance(raised.value.__cause__, UnavailableError)
    assert raised.value.directory == out
    assert f"the artifact is in {out}" in str(raised.value)
    assert f"`manyhats adapters upload sql {out} --server 127.0.0.1:1`" in str(raised.value)
    assert (out / "adapter_model.safetensors").is_file()


def test_a_refusal_is_told_in_the_servers_words(fake: FakeServer, out: Path) -> None:
    fake.status = make_status(grpc.StatusCode.INVALID_ARGUMENT, "rank: too large", reason="ADAPTER_INVALID")
    with pytest.raises(RegistrationError, match="rank: too large; the artifact is in") as raised:
        RegistrationServer(target=fake.target).register("sql", out)
    assert isinstance(raised.value.__cause__, AdapterInvalidError)


def test_an_output_without_an_artifact(fake: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match=r"has no adapter_config\.json"):
        RegistrationServer(target=fake.target).register("sql", tmp_path)
