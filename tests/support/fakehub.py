"""The tests' only model hub: on this machine, and it answers well, badly, or not at all."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

SHA = "1" * 40
MODES = ("open", "refused", "hang", "garbage", "gated", "absent", "wrong", "expired", "breaks")


class Hub:
    """What the server knows; all of it can be changed while it runs.

    mode        one of MODES: open, hangs, answers with a web page, wants access, knows no such model, refuses the token, breaks downloads
                off; "refused" is for tests that ask at another address
    files       {name: content} of every model
    hang_after  hangs from this many answers on; None: never for this reason
    asked       the paths that were asked for
    gave_up     True once a request hung for a minute and the client was still there
    """

    def __init__(self, mode="open", files=None):
        assert mode in MODES, mode
        self.mode, self.files, self.hang_after = mode, files or {}, None
        self.asked, self.address, self.closing, self.gave_up = [], "", threading.Event(), False

    def answer(self, request: Request) -> Response:
        self.asked.append(request.path)
        token = request.headers.get("authorization")
        if self.mode == "hang" or self.hang_after is not None and len(self.asked) > self.hang_after:
            self.gave_up |= not self.closing.wait(60)
            return Response(status=503)
        if self.mode == "garbage":
            return Response("<html>a captive portal</html>")
        if self.mode == "absent":
            return Response("{}", 404, {"X-Error-Code": "RepoNotFound"})
        if self.mode == "wrong" and token:
            return Response("{}", 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.mode == "expired" and token:
            return Response("{}", 401, {"X-Error-Message": f'User Access Token "{token}" is expired'})
        if request.path.endswith("/auth-check"):
            gated = self.mode in ("gated", "expired", "wrong")
            return Response("{}", 401 if gated else 200, {"X-Error-Code": "GatedRepo"} if gated else {})
        if "/resolve/" in request.path:
            return self.file(request)
        if "/tree/" in request.path:
            return self.json([self.entry(name) | {"type": "file", "path": name} for name in self.files])
        siblings = [self.entry(name) | {"rfilename": name} for name in self.files]
        return self.json({"id": "owner/name", "sha": SHA, "siblings": siblings})

    def entry(self, name):
        content = self.files[name]
        digest = hashlib.sha256(content).hexdigest()
        return {
            "size": len(content),
            "oid": digest[:40],
            "blobId": digest[:40],
            "lfs": {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 100},
        }

    def file(self, request):
        name = request.path.rpartition("/")[2]
        content = self.files.get(name)
        if content is None:
            return Response("{}", 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if request.method == "GET" and self.mode == "breaks" and name.endswith(".safetensors"):
            half = iter([content[: len(content) // 2]])  # an iterator, or the response would count its own length
            return Response(half, headers=headers | {"Content-Length": str(len(content))})
        return Response(content, headers=headers)

    @staticmethod
    def json(value):
        return Response(json.dumps(value), mimetype="application/json")


@contextmanager
def serving(mode="open", files=None):
    """A running `Hub`."""
    hub, server = Hub(mode, files), HTTPServer(host="127.0.0.1", port=0, threaded=True)
    server.expect_request(re.compile("")).respond_with_handler(hub.answer)
    server.start()
    hub.address = server.url_for("").rstrip("/")
    try:
        yield hub
    finally:
        hub.closing.set()
        server.stop()


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
