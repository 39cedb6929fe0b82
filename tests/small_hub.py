"""A small Hugging Face hub on this machine: models are downloaded from it, and sent to it."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

TOKEN = "hf_only_for_tests"


class Hub(http.server.BaseHTTPRequestHandler):
    """Any repository that is not in ``repos`` is not there; owner/gated wants a login. Writing takes ``TOKEN``."""

    repos: dict[str, dict[str, bytes]]
    """By owner/name its files."""
    private: set[str]
    asked: list[str]

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.repos.get(repo)
        if repo == "owner/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self.reply([{"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files.items()])
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.reply({"id": repo, "sha": self.commit(repo), "siblings": siblings, "private": repo in self.private})
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in files:
            tag = hashlib.sha1(files[name]).hexdigest()
            self.answer(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit(repo)})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        self.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repo = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/validate-yaml":
            self.reply({"warnings": [], "errors": []})
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            url = f"{constants.ENDPOINT}/{repo}"
            if repo in self.repos:
                return self.reply({"url": url, "error": "You already created this model repo"}, 409)
            self.repos[repo] = {}
            self.private |= {repo} if asked.get("visibility") == "private" else set()
            self.reply({"url": url, "name": repo})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = self.commit(repo)
            self.reply({"commitUrl": f"{constants.ENDPOINT}/{repo}/commit/{oid}", "commitOid": oid})

    def commit(self, repo):
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def reply(self, value, code=200):
        self.answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, code, body, headers=()):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def running(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The hub of this process for a while, with nothing on it and nothing in the cache."""
    Hub.repos, Hub.private, Hub.asked = {}, set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("ENDPOINT", endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(cache)),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub
    server.shutdown()
