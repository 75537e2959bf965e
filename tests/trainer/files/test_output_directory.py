from __future__ import annotations

import errno
from pathlib import Path

import pytest

from manyhats.trainer.errors import OutputError, SettingError
from manyhats.trainer.files.output_directory import (
    make_output_directory,
    remove_if_empty,
    write_artifact,
    write_report,
)
from support.harnesses.failing_calls import FailingCalls, failing

OLD = {"adapter_config.json": b"old config", "adapter_model.safetensors": b"old weights"}
NEW = {"adapter_config.json": b"new config", "adapter_model.safetensors": b"new weights"}
SAME_CONFIG = {"adapter_config.json": b"old config", "adapter_model.safetensors": b"new weights"}
ADAPTERHUB = {"adapter_config.json": b"hub config", "adapter.safetensors": b"hub weights"}


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def fails_for_want_of_space(out: Path, files: dict[str, bytes]) -> bool:
    try:
        write_artifact(out, files)
    except OutputError as error:
        return str(error) == f"{out}: cannot be written: No space left on device"
    return False


def is_registrable(files: dict[str, bytes]) -> bool:
    return "adapter_config.json" in files


@pytest.mark.parametrize("new", [NEW, SAME_CONFIG, ADAPTERHUB], ids=["new", "same config", "another format"])
@pytest.mark.parametrize("has_old", [False, True], ids=["fresh", "over an old one"])
def test_an_artifact_is_written_in_place_of_another(
    new: dict[str, bytes], has_old: bool, tmp_path: Path
) -> None:
    make_output_directory(tmp_path)
    if has_old:
        write_artifact(tmp_path, OLD)
    write_artifact(tmp_path, new)
    assert content(tmp_path) == new


@pytest.mark.parametrize("new", [NEW, SAME_CONFIG, ADAPTERHUB], ids=["new", "same config", "another format"])
@pytest.mark.parametrize("has_old", [False, True], ids=["fresh", "over an old one"])
@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
def test_whichever_call_fails_no_artifact_is_half_there(
    new: dict[str, bytes], has_old: bool, stays: bool, tmp_path: Path
) -> None:
    num_failed = 0
    for fail_at in range(1, 60):
        out = tmp_path / str(fail_at)
        make_output_directory(out)
        if has_old:
            write_artifact(out, OLD)
        with failing(FailingCalls(fail_at, stays=stays, code=errno.ENOSPC)) as calls:
            num_failed += fails_for_want_of_space(out, new)
        if not calls.failed:
            break
        files = {name: data for name, data in content(out).items() if not name.startswith(".")}
        assert not is_registrable(files) or files in (OLD, new)
        if not stays:
            assert content(out).keys() == files.keys(), "nothing staged is left"
        write_artifact(out, new)
        make_output_directory(out)
        assert content(out) == new
    else:
        pytest.fail("the calls have no end")
    assert num_failed >= 7


def test_a_full_disk_leaves_the_old_artifact(tmp_path: Path) -> None:
    make_output_directory(tmp_path)
    write_artifact(tmp_path, OLD)
    write_count = 0
    with failing(FailingCalls(0)) as calls:
        write_artifact(tmp_path, OLD)
    write_count = calls.made.index("write") + 1
    with (
        failing(FailingCalls(write_count, code=errno.ENOSPC)),
        pytest.raises(OutputError, match="No space left"),
    ):
        write_artifact(tmp_path, NEW)
    assert content(tmp_path) == OLD


def test_a_directory_that_cannot_be_written_is_found_out_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory"):
        make_output_directory(tmp_path / "file" / "out")
    make_output_directory(tmp_path / "out")
    with (
        failing(FailingCalls(1, stays=True, code=errno.EROFS)),
        pytest.raises(OutputError, match="Read-only"),
    ):
        make_output_directory(tmp_path / "out")


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SettingError, match=r"out: .* has README.md, which is not from a training run"):
        make_output_directory(tmp_path)
    assert content(tmp_path) == {"README.md": b"mine"}
    (tmp_path / "README.md").unlink()
    (tmp_path / ".hidden").write_text("")
    make_output_directory(tmp_path)
    write_artifact(tmp_path, OLD)
    make_output_directory(tmp_path)


def test_only_an_empty_output_directory_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_output_directory(out)
    remove_if_empty(out)
    assert not out.exists()
    make_output_directory(out)
    write_artifact(out, OLD)
    remove_if_empty(out)
    assert content(out) == OLD


def test_the_report_lies_beside_the_artifact(tmp_path: Path) -> None:
    make_output_directory(tmp_path)
    write_report(tmp_path, b"{}", b"png", "card")
    assert content(tmp_path) == {"README.md": b"card"}
    assert content(tmp_path / "training") == {"report.json": b"{}", "loss.png": b"png"}
    with failing(FailingCalls(2, code=errno.ENOSPC)), pytest.raises(OutputError, match="No space left"):
        write_report(tmp_path, b"{1}", b"png1", "card1")
    assert content(tmp_path / "training") == {"report.json": b"{}", "loss.png": b"png"}
