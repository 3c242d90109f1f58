"""The hub route: a fake hub on this machine, a silent hub, and a hub that was reached once."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import pytest
from tiny_model import save_tiny_model

from tersekv import models
from tersekv.errors import ModelError
from tersekv.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from tersekv import models
from tersekv.errors import ModelError
stages = []
print(models.config("organisation/tiny").model_type)
loaded = models.load("organisation/tiny", progress=lambda *stage: stages.append(stage))
print(loaded.source, loaded.revision, loaded.tokenizer("hello").input_ids)
print(("downloading organisation/tiny", 1.0) in stages)
try:
    models.load("organisation/absent")
except ModelError as error:
    print(error)
"""


def test_silent_hub_costs_seconds_only(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(hub, "_ask", lambda repo: sleep(30))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    began = monotonic()
    with pytest.raises(ModelError, match="hub cannot be reached"):
        models.load("organisation/tiny")
    assert monotonic() - began < 5


def test_kept_configuration_is_not_taken_for_a_model(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--organisation--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_ask", lambda repo: ConnectionError("Name or service not known"))

    assert models.config("organisation/tiny").model_type == "llama"
    with pytest.raises(ModelError, match="hub cannot be reached"):
        models.load("organisation/tiny")


def test_hub_route_against_a_fake_hub(tmp_path):
    """In a process of its own: the hub library reads its address once, at import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), fake_hub(save_tiny_model(tmp_path / "tiny")))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hub"),
    }

    def run(**more: str) -> list[str]:
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    online = run()
    server.shutdown()
    assert online[:3] == ["llama", f"hub organisation/tiny {COMMIT} [1]", "True"]
    assert "no model on the hub" in online[3]
    offline = run(HF_HUB_OFFLINE="1")
    assert offline[:2] == online[:2]
    assert "hub cannot be reached" in offline[3]


def fake_hub(folder: Path) -> type[BaseHTTPRequestHandler]:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if "organisation/tiny" not in self.path:
                return self.answer(404, b"", "text/plain", {"X-Error-Code": "RepoNotFound"})
            if self.path.startswith("/api/models/organisation/tiny/tree/"):
                rows = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in folder.iterdir()
                ]
                return self.answer(200, json.dumps(rows).encode(), "application/json", {})
            if self.path.startswith("/api/models/"):
                names = [{"rfilename": f.name} for f in folder.iterdir()]
                about = {"id": "organisation/tiny", "sha": COMMIT, "siblings": names}
                return self.answer(200, json.dumps(about).encode(), "application/json", {})
            file = folder / self.path.rpartition("/")[2]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}
            return self.answer(200, file.read_bytes(), "application/octet-stream", headers)

        def answer(self, status, body, kind, headers):
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Hub
