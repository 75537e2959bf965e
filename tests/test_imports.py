"""Imports between the packages point one way only."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from measure_structure import run_time_nodes

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "v1": ROOT / "proto/manyhats/v1",
    "settings": ROOT / "server/manyhats/settings",
    "adapters": ROOT / "adapters_store/manyhats/adapters",
    "engine": ROOT / "server/manyhats/engine",
    "server": ROOT / "server/manyhats/server",
    "trainer": ROOT / "trainer/manyhats/trainer",
    "client": ROOT / "clients/manyhats/client",
    "load": ROOT / "clients/manyhats/load",
    "cli": ROOT / "clients/manyhats/cli",
}
ALLOWED = {
    "v1": set(),
    "settings": set(),
    "adapters": {"settings"},
    "engine": {"adapters", "settings"},
    "server": {"v1", "engine", "adapters", "settings"},
    "trainer": {"engine", "adapters", "client", "settings"},
    "client": {"v1"},
    "load": {"client"},
    "cli": set(PACKAGES) - {"cli"},
}
# What a package must not know, wherever the import stands.
FORBIDDEN = {
    "settings": {"torch", "numpy", "grpc", "typer", "rich"},
    "adapters": {"grpc", "prometheus_client"},
    "engine": {"grpc", "prometheus_client", "google"},
    "client": {"torch", "numpy", "transformers", "typer"},
    "load": {"torch", "numpy", "grpc", "typer", "rich"},
}

# Files and folders of a package from the ground up: one may import those before it.
FLOORS = {
    "adapters": """
        errors heads reserved_labels artifact finish_rate limits sites tags activations disk taskid registration
        primitives equations method probe formats methods sources lowering store
    """,
    "engine": """
        errors home output progress constraint request threads model text scheduling backends checkpoints config
        sampling speculation residency loop engine opening
    """,
    "server": "observability access service grpc http lifetime doctor ray",
    "trainer": "errors files settings data methods model memory report run registration train",
    "cli": "terminal options tasks adapters training info model token bench serve doctor main __main__",
}
# What a room of the server must not know: what a call comes through is for the two transports alone.
FORBIDDEN_IN_SERVER = {
    "service": {"grpc", "google", "starlette", "manyhats.v1", "manyhats.server.grpc", "manyhats.server.http"},
    "access": {"grpc", "google", "starlette", "manyhats.v1", "manyhats.server.grpc", "manyhats.server.http"},
    "grpc": {"manyhats.server.http"},
    "http": {"grpc", "google", "manyhats.v1", "manyhats.server.grpc"},
}
# What devices do knows no request, no sequence and no schedule.
KNOWN_TO_BACKENDS = {"errors", "home", "output", "progress", "threads", "model", "backends"}
# What the trainer needs of the engine, whose one use is to measure what was trained as it is served: the files that ask
# it, and the one that opens it.
KNOWN_TO_TRAINER = {"errors", "home", "progress", "model", "checkpoints", "text"}
KNOWN_TO_SCORING = {"label_scoring.py", "head_scoring.py"}, {"config", "engine", "request"}
KNOWN_TO_SERVED = {"served.py"}, {"config", "engine", "opening"}

KNOWN_TO_MODELS = {"errors", "home", "output", "progress", "request", "model"}

BACKENDS = ("cpu", "torch")
SEAM = {"backend", "limits", "open", "plan", "report", "wants"}
# What computes on a device or places replicas, and the only places that import it.
ONLY_IN = {
    "numba": ["server/manyhats/engine/backends/cpu"],
    "triton": ["server/manyhats/engine/backends/cuda"],
    "ray": ["server/manyhats/server/ray"],
    "bitsandbytes": [
        "server/manyhats/engine/backends",
        "server/manyhats/engine/model/nf4.py",
        "trainer/manyhats/trainer/model/linear.py",
        "trainer/manyhats/trainer/run/optimizer.py",
    ],
}

# What takes seconds to import, and what does without; a folder stands for all its files.
SLOW = {"torch", "transformers", "numba", "bitsandbytes"}
WITHOUT_SLOW = """
    adapters.errors adapters.heads adapters.artifact adapters.finish_rate adapters.limits adapters.sites
    adapters.taskid adapters.primitives adapters.method adapters.probe adapters.reserved_labels adapters.registration
    engine.errors engine.home engine.output engine.progress engine.constraint engine.request engine.config
    engine.scheduling
    server.access server.service server.grpc server.http
    server.lifetime.config_file server.lifetime.process
"""


def imported_modules(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Modules and names that a file imports; with ``at_run_time``, not what is for the checker of types alone."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in run_time_nodes(tree) if at_run_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rooms_imported(path: Path, package: str) -> set[str]:
    """Files and folders of a package that one of its files imports, the package itself not counted."""
    parts = (name.split(".") for name in imported_modules(path, at_run_time=True))
    return {name[2] for name in parts if name[:2] == ["manyhats", package] and len(name) > 2}


def room_of(path: Path, package: str) -> str:
    return path.relative_to(PACKAGES[package]).parts[0].removesuffix(".py")


def sources(package: str) -> list[Path]:
    files = [path for path in PACKAGES[package].rglob("*.py") if "_pb2" not in path.name]
    assert files or package == "v1", f"{PACKAGES[package]} holds no source"
    return files


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages_point_one_way(package: str) -> None:
    for path in sources(package):
        parts = (name.split(".") for name in imported_modules(path) if name.startswith("manyhats."))
        others = {name[1] for name in parts} - {package}
        assert others <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {others - ALLOWED[package]}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_does_not_import_what_it_must_not_know(package: str) -> None:
    for path in sources(package):
        top = {name.split(".")[0] for name in imported_modules(path)}
        assert not top & FORBIDDEN[package], f"{path.relative_to(ROOT)} imports {top & FORBIDDEN[package]}"


@pytest.mark.parametrize("package", FLOORS)
def test_imports_within_a_package_point_down(package: str) -> None:
    floors = FLOORS[package].split()
    assert {room_of(path, package) for path in sources(package)} == {"__init__", *floors}
    for path in sources(package):
        room = room_of(path, package)
        below = set() if room == "__init__" else set(floors[: floors.index(room) + 1])
        above = rooms_imported(path, package) - below
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_backends_know_no_schedule() -> None:
    for path in (PACKAGES["engine"] / "backends").rglob("*.py"):
        others = rooms_imported(path, "engine") - KNOWN_TO_BACKENDS
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


def test_backends_do_not_know_each_other_and_others_know_their_seam_alone() -> None:
    home = PACKAGES["engine"] / "backends"
    for path in (each for package in PACKAGES for each in sources(package)):
        own = path.relative_to(home).parts[0] if path.is_relative_to(home) else ""
        known = set(BACKENDS) if path == home / "open.py" else {own} & set(BACKENDS)
        imported = {
            name.split(".")[3]
            for name in imported_modules(path)
            if name.startswith("manyhats.engine.backends.") and name.count(".") > 2
        }
        assert not imported & set(BACKENDS) - known, f"{path.relative_to(ROOT)} imports {imported}"
        assert own or imported <= SEAM, f"{path.relative_to(ROOT)} imports {imported - SEAM}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_some_libraries_are_known_where_they_are_used_alone(library: str) -> None:
    homes = [ROOT / home for home in ONLY_IN[library]]
    for path in (each for package in PACKAGES for each in sources(package)):
        top = {name.split(".")[0] for name in imported_modules(path)}
        at_home = any(path.is_relative_to(home) for home in homes)
        assert at_home or library not in top, f"{path.relative_to(ROOT)} imports {library}"


def test_models_know_nothing_but_words() -> None:
    for path in (PACKAGES["engine"] / "model").rglob("*.py"):
        others = rooms_imported(path, "engine") - KNOWN_TO_MODELS
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


def test_the_trainer_runs_the_engine_to_measure_what_was_trained_alone() -> None:
    for path in sources("trainer"):
        known = set(KNOWN_TO_TRAINER)
        for files, rooms in (KNOWN_TO_SCORING, KNOWN_TO_SERVED):
            known |= rooms if path.parent.name == "report" and path.name in files else set()
        others = rooms_imported(path, "engine") - known
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


def test_words_and_ports_import_nothing_slow() -> None:
    names = []
    for short in WITHOUT_SLOW.split():
        package, _, room = short.partition(".")
        folder = PACKAGES[package] / room.replace(".", "/")
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        paths = (path.relative_to(PACKAGES[package].parent.parent).with_suffix("") for path in files)
        names += [".".join(path.parts) for path in paths]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    assert not {SLOW} & sys.modules.keys(), name\n"
    )
    subprocess.run([sys.executable, "-c", code, *names], check=True)


@pytest.mark.parametrize("room", FORBIDDEN_IN_SERVER)
def test_services_know_no_transport_and_transports_not_each_other(room: str) -> None:
    for path in (PACKAGES["server"] / room).rglob("*.py"):
        for name in imported_modules(path):
            known = {each for each in FORBIDDEN_IN_SERVER[room] if f"{name}.".startswith(f"{each}.")}
            assert not known, f"{path.relative_to(ROOT)} imports {known}"


def test_one_folder_alone_has_the_init_file_that_finds_the_others() -> None:
    folders = {path.parent for path in PACKAGES.values()}
    assert [path.parent.name for path in folders if (path / "__init__.py").exists()] == ["clients"]


@pytest.mark.parametrize("order", [1, -1])
def test_every_package_is_found_and_the_version_told_wherever_the_first_folder_lies(order: int) -> None:
    folders = [str(path) for path in dict.fromkeys(path.parent.parent for path in PACKAGES.values())]
    code = (
        "import importlib.util, sys\n"
        "sys.path[:0] = sys.argv[1:]\n"
        f"for name in {list(PACKAGES)}:\n"
        "    print(importlib.util.find_spec(f'manyhats.{name}').origin)\n"
        "import manyhats\n"
        "print(manyhats.__version__)\n"
        "print([name for name in ('torch', 'grpc', 'typer') if name in sys.modules], hasattr(manyhats, 'nothing'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *folders[::order]], capture_output=True, text=True, check=True
    )
    expected = [str(path / "__init__.py") for path in PACKAGES.values()]
    assert result.stdout.splitlines() == [*expected, metadata.version("manyhats"), "[] False"]
