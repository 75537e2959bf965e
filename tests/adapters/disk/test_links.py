"""Links in an adapter's directory: followed to regular files under the same root, by every way of registering."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

from manyhats.adapters.disk.files import open_local, open_source
from manyhats.adapters.errors import AdapterError, AdapterUnsafeError, SourceNotAllowedError
from manyhats.adapters.lowering.convert import convert
from manyhats.adapters.lowering.inspect import inspect
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from support.factories.adapters import lora_config, lora_tensors, make_base, make_lora

BASE = make_base(names=("org/tiny",))
FILES = ("adapter_config.json", "adapter_model.safetensors")
TEMPLATE = "chat_template.jinja"


def make_hub_cache(hub: Path, *, commit: str = "abc", seed: int = 0) -> Path:
    """An adapter as the hub's client keeps it; the snapshot's directory."""
    plain = make_lora(hub / "plain", BASE, seed=seed)
    repository = hub / "models--me--sql"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    (plain / TEMPLATE).write_text("{{ messages[0].content }}")
    for name in (*FILES, TEMPLATE):
        (plain / name).rename(repository / "blobs" / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../blobs/sha-{name}")
    shutil.rmtree(plain)
    return snapshot


@pytest.mark.parametrize("uri", ["models--me--sql/snapshots/abc", "{hub}/models--me--sql/snapshots/abc"])
def test_a_snapshot_of_the_hubs_cache_is_registered_with_the_digest_of_its_files(
    tmp_path: Path, uri: str
) -> None:
    snapshot = make_hub_cache(tmp_path / "hub")
    store = open_store(tmp_path / "store", BASE, [tmp_path / "hub"])
    record = store.register(Registration("sql", Uri(uri.format(hub=tmp_path / "hub")))).record
    shutil.copytree(snapshot, tmp_path / "hub" / "copy")  # follows the links
    assert store.register(Registration("copy", Uri("copy"))).record.digest == record.digest
    assert inspect(snapshot).digest == record.digest
    (snapshot / TEMPLATE).unlink()
    assert inspect(snapshot).digest != record.digest


def test_a_part_of_a_composed_task_may_be_a_snapshot(tmp_path: Path) -> None:
    make_hub_cache(tmp_path / "hub")
    make_lora(tmp_path / "hub" / "other", BASE, seed=1)
    store = open_store(tmp_path / "store", BASE, [tmp_path / "hub"])
    parts = [("models--me--sql/snapshots/abc", 1.0), ("other", 0.5)]
    assert store.register(Registration("both", Parts([Part(*part) for part in parts]))).record.version == 1


def _place(root: Path, name: str, generator: random.Random) -> None:
    """Put a file of ``root/a`` somewhere else under the root, and a chain of links to it in its place."""
    target = root / generator.choice(["blobs", "a", "deep/er/still", "."]) / f"blob-{name}.data"
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / "a" / name).rename(target)
    for step in range(generator.randint(1, 4)):
        where = root / generator.choice(["a", "links", "more/links"])
        where.mkdir(parents=True, exist_ok=True)
        link = where / f"link-{step}-{name}.data"
        link.symlink_to(_spelled(target, where, generator))
        target = link
    (root / "a" / name).symlink_to(_spelled(target, root / "a", generator))


def _spelled(target: Path, where: Path, generator: random.Random) -> str:
    relative = os.path.relpath(target, where)
    return generator.choice([relative, str(target), f"./{relative}", f"../{where.name}/{relative}"])


@pytest.mark.parametrize("seed", range(24))
def test_chains_of_links_under_the_root_are_followed(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    root = tmp_path / "root"
    expected = inspect(make_lora(root / "a", BASE)).digest
    for name in FILES:
        _place(root, name, generator)
    if generator.random() < 0.5:  # the folder itself behind a link, and the root too
        (root / "a").rename(root / "moved")
        (root / "a").symlink_to("moved")
        (tmp_path / "alias").symlink_to("root")
        root = tmp_path / "alias"
    store = open_store(tmp_path / "store", BASE, [root])
    assert store.register(Registration("task", Uri("a"), validate_only=True)).record.digest == expected
    assert inspect(root / "a").refusals == ()


OUTSIDE = {
    "a relative link out": "../../secret/{name}",
    "an absolute link out": "{tmp}/secret/{name}",
    "a chain out": "../chain-{name}",
    "through a linked folder": "../folder/{name}",
    "to an alias of the parent": "../up/secret/{name}",
    "a look-alike of the root": "{tmp}/root-2/{name}",
    "to nothing": "nothing",
    "to nothing outside": "../../nothing",
    "to itself": "{name}",
    "in a circle": "../circle-1",
    "to a folder": "../a",
    "to the root": "..",
    "to a pipe": "../pipe",
    "to a device": "/dev/zero",
    "to a terminal": "/dev/tty",
    "to the process": "/proc/self/environ",
    "to a descriptor": "/proc/self/fd/0",
    "below a file": "../file/{name}",
    "with a slash behind it": "../nothing/",
    "of a long name": "xxxxxxxx" * 40,
    "over a long way": "./" * 1500 + "nothing",
    "through a thousand links": "../hop-1000",
}


@pytest.mark.parametrize("name", [*FILES, TEMPLATE])
@pytest.mark.parametrize("what", OUTSIDE)
def test_links_that_lead_elsewhere_are_refused(tmp_path: Path, what: str, name: str) -> None:
    root = tmp_path / "root"
    for number, directory in enumerate((root / "a", tmp_path / "secret", tmp_path / "root-2")):
        make_lora(directory, BASE, seed=number)
        (directory / TEMPLATE).write_text("{{ messages[0].content }}")
    (root / f"chain-{name}").symlink_to(f"../secret/{name}")
    (root / "folder").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    (root / "circle-1").symlink_to("circle-2")
    (root / "circle-2").symlink_to("circle-1")
    os.mkfifo(root / "pipe")
    (root / "file").write_text("{}")
    if "thousand" in what:
        (root / "hop-0").symlink_to("file")
        for index in range(1000):
            (root / f"hop-{index + 1}").symlink_to(f"hop-{index}")
    (root / "a" / name).unlink()
    (root / "a" / name).symlink_to(OUTSIDE[what].format(name=name, tmp=tmp_path))
    store = open_store(tmp_path / "store", BASE, [root])
    with pytest.raises(AdapterUnsafeError) as caught:
        store.register(Registration("task", Uri("a")))
    assert caught.value.subject == name
    assert str(tmp_path) not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_folder_behind_a_thousand_links_is_refused_as_any_other(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_lora(root / "hop-0", BASE)
    for index in range(1000):
        (root / f"hop-{index + 1}").symlink_to(f"hop-{index}")
    with pytest.raises(SourceNotAllowedError), open_source("hop-1000", [root]):
        pass


def test_a_root_that_is_a_snapshot_does_not_reach_the_blobs(tmp_path: Path) -> None:
    snapshot = make_hub_cache(tmp_path / "hub")
    with pytest.raises(AdapterUnsafeError, match="out of the root"), open_source(".", [snapshot]) as source:
        source.open_file(FILES[0], 10**6).__enter__()


def test_a_link_that_is_swapped_all_the_time_never_leads_out(tmp_path: Path) -> None:
    """Somebody who writes under the root races the reader: file, link inside, link outside, folder of either."""
    root = tmp_path / "root"
    for directory, content in ((root / "in", "inside"), (tmp_path / "out", "secret")):
        directory.mkdir(parents=True)
        (directory / "file").write_text(content)
    (root / "a").mkdir()
    ended = threading.Event()
    targets = ["../in/file", "../hop/file", str(tmp_path / "out" / "file"), "../../out/file"]

    def swap() -> None:
        count = 0
        while not ended.is_set():
            count += 1
            for link, target in (
                (root / "a" / "file", targets[count % 4]),
                (root / "hop", ["in", "../out"][count % 2]),
            ):
                (root / "new").symlink_to(target)
                (root / "new").replace(link)

    (root / "a" / "file").symlink_to(targets[0])
    (root / "hop").symlink_to("in")
    swapper = threading.Thread(target=swap)
    swapper.start()
    contents: set[str] = set()
    try:
        with open_source("a", [root]) as source:
            for _ in range(3000):
                try:
                    with source.open_file("file", 100) as file:
                        contents.add(bytes(file.read()).decode())
                except AdapterError:
                    contents.add("refused")
    finally:
        ended.set()
        swapper.join()
    assert "secret" not in contents
    assert "inside" in contents


def test_no_descriptor_is_left_open_behind_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "file").write_text("x")
    for name, target in (("good", "../file"), ("out", "/etc/passwd"), ("gone", "nothing"), ("loop", "loop")):
        (root / "a" / name).symlink_to(target)
    before = len(os.listdir("/proc/self/fd"))
    with open_source("a", [root]) as source:
        for name in ("good", "out", "gone", "loop"):
            try:
                with source.open_file(name, 10):
                    pass
            except AdapterUnsafeError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_offline_a_link_may_lead_wherever_its_reader_may_read(tmp_path: Path) -> None:
    plain = make_lora(tmp_path / "elsewhere" / "plain", BASE)
    (tmp_path / "linked").mkdir()
    for name in FILES:
        (tmp_path / "linked" / name).symlink_to(plain / name)
    assert inspect(tmp_path / "linked").refusals == ()
    assert inspect(tmp_path / "linked").digest == inspect(plain).digest
    snapshot = make_hub_cache(tmp_path / "hub")
    assert inspect(snapshot).refusals == ()


def test_offline_a_relative_path_goes_up_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lora(tmp_path / "far" / "plain", BASE)
    (tmp_path / "far" / "start").mkdir()
    (tmp_path / "link").symlink_to("far/start")
    monkeypatch.chdir(tmp_path)
    with open_local(Path("link/../plain")) as source:
        assert set(FILES) <= set(source.names())


@pytest.mark.parametrize("target", ["/dev/zero", "../pipe", "nothing", "adapter_config.json"])
def test_offline_devices_pipes_and_circles_are_refused_too(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    make_lora(tmp_path / "a", BASE)
    (tmp_path / "a" / FILES[0]).unlink()
    (tmp_path / "a" / FILES[0]).symlink_to(target)
    assert [(each.reason, each.subject) for each in inspect(tmp_path / "a").refusals] == [
        ("ADAPTER_UNSAFE", FILES[0])
    ]


def test_offline_a_directory_below_one_that_may_be_passed_but_not_listed_is_read(tmp_path: Path) -> None:
    make_lora(tmp_path / "home" / "a", BASE)
    (tmp_path / "home").chmod(0o111)
    try:
        assert inspect(tmp_path / "home" / "a").refusals == ()
    finally:
        (tmp_path / "home").chmod(0o755)


def test_a_linked_pickle_is_converted(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "blobs" / "config").write_text(json.dumps(lora_config(BASE)))
    torch.save(lora_tensors(BASE), tmp_path / "blobs" / "weights")
    (tmp_path / "old" / "adapter_config.json").symlink_to("../blobs/config")
    (tmp_path / "old" / "adapter_model.bin").symlink_to("../blobs/weights")
    convert(tmp_path / "old", tmp_path / "new")
    assert inspect(tmp_path / "new").refusals == ()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "."])
def test_what_is_no_regular_file_is_not_converted(tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "old").mkdir()
    os.mkfifo(tmp_path / "old" / "pipe")
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(lora_config(BASE)))
    torch.save(lora_tensors(BASE), tmp_path / "old" / "adapter_model.bin")
    (tmp_path / "old" / name).unlink()
    (tmp_path / "old" / name).symlink_to(target)
    with pytest.raises(AdapterUnsafeError):
        convert(tmp_path / "old", tmp_path / "new")
