"""The TypeScript client: its generated code is current, its package is whole, and its tests pass on a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

import generate_typescript
from generate_typescript import CLIENT
from manyhats.client import Client, Credentials
from restart_under_load import serve_command, serving
from support.servers.secure import add_token, make_pki

pytestmark = [pytest.mark.deploy, pytest.mark.real_model]

MODEL = "smollm2-135m-instruct"
ADAPTERS = CLIENT.parents[1] / "examples" / "adapters"


def npm(*arguments: str, **variables: str) -> str:
    program = shutil.which("npm")
    assert program is not None, "npm is not installed (Debian's package npm, or Node's own)"
    result = subprocess.run(
        [program, *arguments],
        cwd=CLIENT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    """Exactly the packages of the lockfile."""
    npm("ci")


@contextmanager
def served(root: Path, *, secured: bool) -> Iterator[Mapping[str, str]]:
    """A server with the task ``sql``, with TLS and tokens or in the clear; what its callers need to know."""
    settings: dict[str, object] = {}
    credentials, caller, scheme = None, {}, "http"
    if secured:
        pki, tokens = make_pki(root / "pki"), root / "tokens.yaml"
        token = add_token(tokens, "node")
        tokens.chmod(0o600)
        settings = {
            "tls_cert": str(pki.files.certificate),
            "tls_key": str(pki.files.key),
            "token_file": str(tokens),
        }
        credentials = Credentials(token=token, ca_file=pki.ca_file)
        caller, scheme = {"MANYHATS_TOKEN": token, "MANYHATS_CA": str(pki.ca_file)}, "https"
    command = serve_command(
        root / "server.yaml",
        model=MODEL,
        store=str(root / "store"),
        adapter_roots=[str(ADAPTERS)],
        **settings,
    )
    with serving(command) as (_, ready):
        with Client(ready["grpc"], credentials=credentials) as client:
            client.register_adapter("sql", "sql")
        addresses = {
            "MANYHATS_GRPC": f"{scheme}://{ready['grpc']}",
            "MANYHATS_HTTP": f"{scheme}://{ready['http']}",
        }
        yield {**addresses, **caller, "MANYHATS_ADAPTER": str(ADAPTERS / "sentiment")}


def test_the_generated_code_is_that_of_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_typescript.check() == 0, capsys.readouterr().out


@pytest.mark.parametrize("secured", [False, True], ids=["clear", "secured"])
def test_its_own_tests_pass_on_a_server(tmp_path: Path, secured: bool) -> None:
    with served(tmp_path, secured=secured) as variables:
        said = npm("test", **variables)
    counts = dict(re.findall(r"^# (\w+) (\d+)$", said, re.MULTILINE))
    assert (counts["fail"], counts["skipped"]) == ("0", "0" if secured else "1")  # a wrong token needs tokens


def test_the_examples_of_its_readme_compile() -> None:
    npm("run", "build")
    blocks = re.findall(r"^```ts\n(.*?)^```$", (CLIENT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    folder = CLIENT / "build" / "readme"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}.ts" for number, _ in enumerate(blocks)]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block)
    options = [
        "--noEmit",
        "--strict",
        "--skipLibCheck",
        "--module",
        "nodenext",
        "--target",
        "es2022",
        "--types",
        "node",
    ]
    npm("exec", "--", "tsc", "--ignoreConfig", *options, *map(str, files))


def test_its_package_has_the_client_alone() -> None:
    (packed,) = json.loads(npm("pack", "--dry-run", "--json", "--ignore-scripts"))
    folders = {Path(file["path"]).parts[0] for file in packed["files"]}
    assert folders == {"README.md", "build", "package.json", "src"}
    assert not [file["path"] for file in packed["files"] if file["path"].startswith("build/test")]
