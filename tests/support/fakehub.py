"""A model hub on this machine that answers well, badly, or not at all."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "1" * 40


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(path)
        token = self.headers.get("authorization")
        if hub.mode == "hang":
            hub.closing.wait(60)
        elif hub.mode == "garbage":
            self.answer(200, b"<html>a captive portal</html>")
        elif hub.mode in ("wrong", "expired") and token:
            said = (
                "Invalid credentials in Authorization header"
                if hub.mode == "wrong"
                else f'User Access Token "{token}" is expired'
            )
            self.answer(401, b"{}", {"X-Error-Message": said})
        elif path.endswith("/auth-check"):
            gated = hub.mode in ("gated", "expired", "wrong")
            self.answer(401 if gated else 200, b"{}", {"X-Error-Code": "GatedRepo"} if gated else {})
        elif "/resolve/" in path:
            self.file(path.rpartition("/")[2])
        elif "/tree/" in path:
            self.answer(
                200, json.dumps([self.entry(name) | {"type": "file", "path": name} for name in hub.files]).encode()
            )
        else:
            siblings = [self.entry(name) | {"rfilename": name} for name in hub.files]
            self.answer(200, json.dumps({"id": "owner/name", "sha": SHA, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def entry(self, name):
        content = self.server.files[name]
        digest = hashlib.sha256(content).hexdigest()
        return {
            "size": len(content),
            "oid": digest[:40],
            "blobId": digest[:40],
            "lfs": {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 100},
        }

    def file(self, name):
        content = self.server.files.get(name)
        if content is None:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        half = self.command == "GET" and self.server.mode == "breaks" and name.endswith(".safetensors")
        self.answer(200, content, headers, cut=half)

    def answer(self, status, body, headers=None, cut=False):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving(mode="open", files=None):
    """A server; `mode` is open, hang, garbage, gated, wrong, expired (token) or breaks (downloads), and can be changed while it runs."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub.daemon_threads, hub.block_on_close = True, False
    hub.mode, hub.files, hub.asked, hub.closing = mode, files or {}, [], threading.Event()
    hub.address = f"http://127.0.0.1:{hub.server_address[1]}"
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()


def use(monkeypatch, address, home):
    """Point huggingface_hub, imported already, at this address and at an empty home of its own."""
    from huggingface_hub import constants

    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
