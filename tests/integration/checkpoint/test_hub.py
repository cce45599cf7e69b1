"""open_checkpoint of a name: downloaded once from a hub on this machine, then from the cache."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint import hub
from int4_lora.integration.cli.app import app

COMMIT = "0" * 40
OPEN = """
import sys
from int4_lora.integration import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
print(len(checkpoint.modules()), checkpoint.packed_weight(checkpoint.modules()[0]).shape)
"""


@pytest.fixture
def hub_server(tiny_models):
    """Return (address, requests) of a hub that has one model, ``made/tiny``."""
    files = {file.name: file.read_bytes() for file in tiny_models["asym-g32"].iterdir()}
    files["pickle.bin"] = b"never to be asked for"
    requests = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            body, headers = self.answer()
            self.send_response(200 if body is not None else 404)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET" and body:
                self.wfile.write(body)

        do_HEAD = do_GET

        def answer(self):
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/made/tiny/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in files.items()
                ]
                return json.dumps(tree).encode(), {"Content-Type": "application/json"}
            if path.startswith("/api/models/made/tiny"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "made/tiny", "modelId": "made/tiny", "sha": COMMIT}
                info |= {"private": False, "tags": [], "downloads": 0, "siblings": siblings}
                return json.dumps(info).encode(), {"Content-Type": "application/json"}
            name = path.rpartition("/")[2]
            if path.startswith("/made/tiny/resolve/") and name in files:
                tag = hashlib.sha256(files[name]).hexdigest()
                return files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
            return None, {"X-Error-Code": "RepoNotFound"}

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def run(name, cache, endpoint, monkeypatch, offline="0"):
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    command = [sys.executable, "-c", OPEN, name]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_model_is_downloaded_once(hub_server, tmp_path, monkeypatch):
    endpoint, requests = hub_server
    first = run("made/tiny", tmp_path, endpoint, monkeypatch)
    assert first.stdout.split()[0] == "14", first.stderr
    assert any("model.safetensors" in request for request in requests)
    assert not any("pickle" in request for request in requests)
    requests.clear()
    for offline in ("0", "1"):
        again = run("made/tiny", tmp_path, endpoint, monkeypatch, offline)
        assert again.stdout == first.stdout, again.stderr
    assert requests == []


def test_a_cache_that_holds_a_part_of_a_model_is_filled(hub_server, tmp_path, monkeypatch):
    """Other tools fetch config.json alone."""
    endpoint, requests = hub_server
    assert run("made/tiny", tmp_path, endpoint, monkeypatch).returncode == 0
    (snapshot,) = tmp_path.glob("hub/models--made--tiny/snapshots/*")
    weights = snapshot / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    requests.clear()
    again = run("made/tiny", tmp_path, endpoint, monkeypatch)
    assert again.stdout.split()[0] == "14", again.stderr
    assert any("model.safetensors" in request for request in requests)


def test_a_model_that_is_not_there(hub_server, tmp_path, monkeypatch):
    endpoint, _ = hub_server
    result = run("made/other", tmp_path, endpoint, monkeypatch)
    assert "made/other is no folder, not in the hub's cache, and cannot be" in result.stderr
    offline = run("made/tiny", tmp_path, endpoint, monkeypatch, offline="1")
    assert "cannot be downloaded" in offline.stderr


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "../a/b", "/nowhere/at all", "a/..", "a\0/b"])
def test_what_is_no_name_is_never_looked_up(path, monkeypatch):
    monkeypatch.setattr(
        hub.importlib, "import_module", lambda name: pytest.fail(f"imported {name}")
    )
    with pytest.raises((FileNotFoundError, ValueError)):
        open_checkpoint(path)


def test_a_folder_is_taken_as_it_is(tiny_models):
    assert hub.local_folder(tiny_models["g32"]) == tiny_models["g32"]


@pytest.mark.parametrize("command", ["inspect", "verify", "tune"])
def test_a_mistyped_folder_is_no_name(command, monkeypatch):
    monkeypatch.setattr(
        hub.importlib, "import_module", lambda name: pytest.fail(f"imported {name}")
    )
    result = CliRunner().invoke(app, [command, "./nowhere/model"])
    assert result.exit_code == 2
    assert "nowhere/model is not a folder with a checkpoint" in result.output
