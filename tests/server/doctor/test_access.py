"""What the doctor says of certificates, keys and tokens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from manyhats.server.access.tokens import Role
from manyhats.server.doctor.access import look_at_tls, look_at_tokens
from support.harnesses.doctor import Make, bad, conditions, only
from support.servers.secure import Pki, add_token, make_pki

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    pki = make_pki(tmp_path / "pki")
    pki.files.key.chmod(0o600)
    return pki


def given(pki: Pki) -> dict[str, Path]:
    return {"tls_cert": pki.files.certificate, "tls_key": pki.files.key}


def test_without_tls_it_depends_on_who_can_connect(make: Make) -> None:
    assert only(look_at_tls(make())).condition.value == "ok"
    finding = only(look_at_tls(make(host="0.0.0.0", insecure=True)))
    assert finding.condition.value == "warning"
    assert "--tls-cert" in finding.advice


def test_a_sound_certificate_says_how_long_it_lasts(make: Make, pki: Pki) -> None:
    pki.issue(NOW - timedelta(days=1), NOW + timedelta(days=100))
    findings = list(look_at_tls(make(**given(pki), tls_client_ca=pki.ca_file), NOW))
    assert conditions(findings) == [("TLS", "ok"), ("TLS", "ok")]
    assert findings[0].text == "--tls-cert: 100 days left"


@pytest.mark.parametrize(
    ("begins", "ends", "condition", "text"),
    [
        (-100, -2, "failure", "--tls-cert expired 2 days ago"),
        (1, 100, "failure", "--tls-cert is valid only from"),
        (-100, 5, "warning", "--tls-cert expires in 5 days"),
    ],
)
def test_a_certificate_at_the_wrong_time(
    make: Make, pki: Pki, begins: int, ends: int, condition: str, text: str
) -> None:
    pki.issue(NOW + timedelta(days=begins), NOW + timedelta(days=ends))
    finding = only(look_at_tls(make(**given(pki)), NOW))
    assert (finding.condition.value, finding.text.startswith(text)) == (condition, True), finding.text
    assert finding.advice


def test_a_key_of_another_certificate_fails(make: Make, pki: Pki, tmp_path: Path) -> None:
    other = make_pki(tmp_path / "other")
    finding = only(look_at_tls(make(tls_cert=pki.files.certificate, tls_key=other.files.key)))
    assert finding.condition.value == "failure"
    assert str(other.files.key) in finding.text


def test_a_key_that_others_may_read_is_a_warning_but_not_as_kubernetes_mounts_it(
    make: Make, pki: Pki
) -> None:
    pki.files.key.chmod(0o640)
    (finding,) = bad(look_at_tls(make(**given(pki))))
    assert (finding.condition.value, finding.advice) == ("warning", f"chmod 600 {pki.files.key}")
    (pki.directory / "..data").symlink_to(pki.directory)
    assert bad(look_at_tls(make(**given(pki)))) == []


def test_without_tokens_it_depends_on_who_can_connect(make: Make) -> None:
    assert only(look_at_tokens(make(), None)).condition.value == "ok"
    finding = only(look_at_tokens(make(host="0.0.0.0", insecure=True), None))
    assert finding.condition.value == "warning"


def test_tokens_for_tasks_that_are_there(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    add_token(file, "ops")
    add_token(file, "ci", [Role.GENERATE], ["sql", "team-*", "_base"])
    file.chmod(0o644)
    finding = only(look_at_tokens(make(token_file=file), {"sql", "team-a"}))
    assert (finding.condition.value, finding.text) == ("ok", "2, of which 1 may manage adapters")


def test_a_name_without_a_task_is_a_warning_unless_the_tasks_are_unknown(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    add_token(file, "ci", [Role.GENERATE], ["sql", "tldr", "team-*"])
    file.chmod(0o600)
    found = list(look_at_tokens(make(token_file=file), {"sql"}))
    (finding,) = bad(found)
    assert finding.condition.value == "warning"
    assert finding.text == "ci is for tldr, but the store has no such task"
    assert "ci is for team-*, which no task is called yet" in [each.text for each in found]
    assert bad(look_at_tokens(make(token_file=file), None)) == []


def test_a_token_file_that_cannot_be_used_fails(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    config = make(token_file=file)
    assert only(look_at_tokens(config, None)).condition.value == "failure"
    file.write_text("- name: ci\n")
    finding = only(look_at_tokens(config, None))
    assert (finding.condition.value, "sha256" in finding.text) == ("failure", True)


def test_a_token_file_that_others_may_write_or_without_tokens_is_a_warning(
    make: Make, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text("[]\n")
    file.chmod(0o666)
    writable, empty = bad(look_at_tokens(make(token_file=file), None))
    assert writable.advice == f"chmod go-w {file}"
    assert "nobody may call" in empty.text
