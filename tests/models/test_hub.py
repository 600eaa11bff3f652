"""A hub id is downloaded once, only what a model needs, from a hub that speaks the protocol on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fettle.models.source import demo_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/small-model"


class Hub(ThreadingHTTPServer):
    """Serves one model as the hub does: a listing of a revision, then a file an address, with its hash as ETag."""

    def __init__(self, folder: Path, extra: dict[str, bytes]) -> None:
        self.files = {path.name: path for path in folder.iterdir() if path.is_file()}
        self.extra = extra
        self.served: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)

    def content(self, name: str) -> bytes | None:
        if name in self.extra:
            return self.extra[name]
        return self.files[name].read_bytes() if name in self.files else None

    def listing(self) -> dict[str, object]:
        names = [*self.files, *self.extra]
        return {"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}

    def tree(self) -> list[dict[str, object]]:
        held = {name: self.content(name) or b"" for name in [*self.files, *self.extra]}
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in held.items()
        ]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{MODEL}"):
            listing = self.server.tree() if "/tree/" in path else self.server.listing()
            return self.send(json.dumps(listing).encode(), "listing", body=True)
        if path.startswith(f"/{MODEL}/resolve/"):
            name = path.rsplit("/", 1)[1]
            content = self.server.content(name)
            if content is not None:
                if body:
                    self.server.served.append(name)
                return self.send(content, hashlib.sha256(content).hexdigest(), body=body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send(self, content: bytes, etag: str, *, body: bool) -> None:
        self.send_response(200)
        for name, value in (("ETag", f'"{etag}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the test's own output is enough."""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub(demo_folder(), {"pytorch_model.bin": b"never wanted", "modeling_small.py": b"raise SystemExit"})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


COMMANDS = (
    ["inspect", MODEL, "--json"],
    ["inspect", MODEL, "--json"],  # again: from the cache
    ["inspect", "someone/other-model"],
)
SCRIPT = """
import contextlib, io, json, sys
from fettle.cli.main import main

said = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(words)
    said.append((code, out.getvalue(), error.getvalue()))
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Told:
    code: int
    out: str
    error: str


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub") / "cache"


@pytest.fixture(scope="module")
def told(hub: Hub, cache: Path) -> list[Told]:
    """What `COMMANDS` said, in one process: the addresses are read from the environment when it starts."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return [Told(*each) for each in json.loads(ran.stdout.splitlines()[-1])]


def test_a_hub_id_is_downloaded_once_and_only_what_a_model_needs(hub: Hub, cache: Path, told: list[Told]) -> None:
    first, again, _ = told
    assert first.code == 0, first.error
    assert json.loads(first.out)["family"] == "llama"
    assert not {"pytorch_model.bin", "modeling_small.py"} & set(hub.served)
    [held] = cache.glob("models--*/snapshots/*/model.safetensors")
    assert held.read_bytes() == (demo_folder() / "model.safetensors").read_bytes()
    assert again.out == first.out
    assert hub.served.count("model.safetensors") == 1, "the cache was not used"
    assert len(hub.served) == len(set(hub.served))


def test_a_model_that_the_hub_does_not_have_is_one_sentence(told: list[Told]) -> None:
    missing = told[-1]
    assert missing.code == 4
    assert "the hub has no model 'someone/other-model' that you may read" in missing.error
    assert "Traceback" not in missing.error
