"""push_to_hub and from_pretrained against a local server that speaks the Hub's HTTP API.

The server holds one repository in memory: creation, the question how each file goes up, large files by LFS, the commit,
and downloads. The client is this file in a process of its own, because huggingface_hub reads its endpoint when imported; it
tells the server how to fail, so that one process tries it all.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
REPO = "org/half-bert"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_stub"
REFUSALS = {"api/repos/create": 403, "commit/": 500}
MESSAGES = {403: "You are not allowed to do that.", 500: "Something broke."}


class Hub:
    """What the server holds, what it was asked for, and how it fails: path part -> status."""

    def __init__(self):
        self.files, self.blobs, self.asked, self.failures = {}, {}, [], {}
        self.created, self.endpoint = False, ""

    def answer(self, method, path, body):
        """Returns status, body (bytes, or what becomes JSON) and headers."""
        if path == "/failures":
            self.failures = json.loads(body)
            return 200, {"files": len(self.files)}, {}
        failure = next((status for part, status in self.failures.items() if part in path), None)
        if failure:
            return failure, {"error": MESSAGES[failure]}, {"X-Error-Message": MESSAGES[failure]}
        routes = {
            "/api/repos/create": self.create,
            "/api/validate-yaml": lambda path, body: {"errors": [], "warnings": []},
            f"/api/models/{REPO}/preupload/main": self.preupload,
            f"/{REPO}.git/info/lfs/objects/batch": self.offer_upload,
            f"/api/models/{REPO}/commit/main": self.commit,
            "/lfs/": self.store,
            f"/api/models/{REPO}": self.describe,
        }
        if path.startswith(f"/{REPO}/resolve/"):
            return self.file(path.removeprefix(f"/{REPO}/resolve/").partition("/")[2])
        route = next((route for start, route in routes.items() if path.startswith(start)), None)
        found = route(path, body) if route and (self.created or path == "/api/repos/create") else None
        return (404, {"error": f"nothing at {path}"}, {"X-Error-Code": "RepoNotFound"}) if found is None else (200, found, {})

    def create(self, path, body):
        self.created = True
        return {"url": f"{self.endpoint}/{REPO}", "id": REPO, "name": REPO}

    def preupload(self, path, body):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        files = [{"path": p, "uploadMode": mode, "shouldIgnore": False, "oid": None} for p, mode in modes.items()]
        return {"files": files, "commitOid": COMMIT}

    def offer_upload(self, path, body):
        def offer(oid):
            return {"upload": {"href": f"{self.endpoint}/lfs/{oid}", "header": {}}}

        files = json.loads(body)["objects"]
        return {"transfer": "basic", "objects": [{**file, "actions": offer(file["oid"])} for file in files]}

    def store(self, path, body):
        oid = path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return {}

    def commit(self, path, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        url = f"{self.endpoint}/{REPO}/commit/{COMMIT}"
        return {"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True}

    def describe(self, path, body):
        if "/tree/" in path:
            return [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in self.files.items()]
        siblings = [{"rfilename": name} for name in self.files]
        return {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []}

    def file(self, name):
        if name not in self.files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        content = self.files[name]
        digest = hashlib.sha256(content).hexdigest()
        return 200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def handle_one(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path, self.headers.get("Authorization")))
            status, answer, headers = hub.answer(self.command, path, body)
            answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_HEAD = do_POST = do_PUT = handle_one

    return Handler


@pytest.fixture
def hub():
    stub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(stub))
    stub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield stub
    server.shutdown()
    server.server_close()
    thread.join()


def client(hub, tmp_path, *words):
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)


def half():
    from shrp_hf import KeepPlan, prune_heads
    from tests.tiny import tiny_bert

    dense = tiny_bert(num_labels=2).eval()
    return prune_heads(dense, KeepPlan(((0, 1),) * dense.config.num_hidden_layers, dense.config.num_attention_heads))


def fail(**failures):
    """Tells the server what to refuse from now on; returns how many files it holds."""
    body = json.dumps({f"/{part}": status for part, status in failures.items()}).encode()
    with urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/failures", data=body) as answer:
        return json.load(answer)["files"]


def push(with_code):
    """Pushes to a server that refuses, to one that breaks, and to one that works; keeps what the first two said."""
    from huggingface_hub.errors import HfHubHTTPError

    said = []
    for part, status in REFUSALS.items():
        fail(**{part: status})
        try:
            half().push_to_hub(REPO, with_code=with_code)
        except HfHubHTTPError as error:
            said.append([str(error), fail()])
    Path("said.json").write_text(json.dumps(said), encoding="utf-8")
    half().push_to_hub(REPO, with_code=with_code)


def pull(trusting):
    """Opens what is there with Transformers alone, or with shrp_hf, and keeps its logits; first while weights are refused."""
    from transformers import AutoModelForSequenceClassification

    if not trusting:
        import shrp_hf  # noqa: F401
    load = AutoModelForSequenceClassification.from_pretrained
    trust = {"trust_remote_code": True} if trusting else {}
    fail(**{"model.safetensors": 403})
    try:
        load(REPO, cache_dir="refused", **trust)
    except (OSError, ValueError) as error:
        Path("refused.txt").write_text(str(error), encoding="utf-8")
    fail()
    model = load(REPO, **trust)
    assert type(model).__module__.startswith("transformers_modules" if trusting else "shrp_hf")
    with torch.inference_mode():
        torch.save(model.eval()(torch.load("ids.pt")).logits, "logits.pt")


@pytest.mark.parametrize(
    "with_code", [pytest.param(True, id="with its code"), pytest.param(False, id="without", marks=pytest.mark.slow)]
)
def test_a_pushed_model_comes_back_from_the_hub_and_failures_are_said(with_code, hub, tmp_path):
    pushed = client(hub, tmp_path, "push", int(with_code))
    assert pushed.returncode == 0, pushed.stderr
    said = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    for (message, num_files), status in zip(said, REFUSALS.values(), strict=True):
        assert MESSAGES[status] in message
        assert num_files == 0
    assert hub.created
    assert {"config.json", "model.safetensors"} <= hub.files.keys()
    assert any(name.endswith(".py") for name in hub.files) == with_code
    assert not any(name.startswith(".") for name in hub.files)
    assert {token for _, path, token in hub.asked if path.startswith("/api/")} == {f"Bearer {TOKEN}"}
    assert ("PUT", f"/lfs/{hashlib.sha256(hub.files['model.safetensors']).hexdigest()}") in {a[:2] for a in hub.asked}

    ids = torch.arange(12).reshape(2, 6) + 1
    torch.save(ids, tmp_path / "ids.pt")
    pulled = client(hub, tmp_path, "pull", int(with_code))
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "refused.txt").exists()
    with torch.inference_mode():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), half()(ids).logits)


if __name__ == "__main__":
    {"push": push, "pull": pull}[sys.argv[1]](bool(int(sys.argv[2])))
