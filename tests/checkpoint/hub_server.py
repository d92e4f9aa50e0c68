"""A stand-in for both model hubs: serves one folder over the parts of their HTTP APIs that a snapshot needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """`downloads` holds the paths of the files whose content was asked for."""

    url: str
    downloads: set[str] = field(default_factory=set)


@contextmanager
def serve_hub(model_id: str, folder: Path) -> Iterator[HubServer]:
    """Serve `folder` as the model `model_id`; every other id is unknown."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub = HubServer("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            match url.path.removeprefix("/").split("/"):
                case [""]:
                    self.send(b"")
                case ["api", "models", org, name, *rest] if f"{org}/{name}" == model_id:
                    self.send_json(_tree(files) if rest[:1] == ["tree"] else {"id": model_id, "sha": COMMIT})
                case [org, name, "resolve", _, *path] if f"{org}/{name}" == model_id and "/".join(path) in files:
                    self.send_file("/".join(path))
                case ["api", "v1", "models", org, name, "repo", "files"] if f"{org}/{name}" == model_id:
                    self.send_json({"Code": 200, "Success": True, "Data": {"Files": _files(files)}})
                case ["api", "v1", "models", org, name, "repo"] if f"{org}/{name}" == model_id:
                    self.send_file(query["FilePath"][0])
                case _:
                    self.send_json({"Code": 404, "Message": "no such model", "error": "Repository not found"}, 404)

        def send_file(self, path: str) -> None:
            if self.command == "GET":
                hub.downloads.add(path)
            self.send(files[path], ETag=f'"{hashlib.sha1(files[path]).hexdigest()}"')

        def send_json(self, content: object, status: int = 200) -> None:
            error = {} if status == 200 else {"X-Error-Code": "RepoNotFound"}
            self.send(json.dumps(content).encode(), status, **{"Content-Type": "application/json"}, **error)

        def send(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _tree(files: dict[str, bytes]) -> list[dict]:
    """As Hugging Face lists a repository."""
    return [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in files.items()
    ]


def _files(files: dict[str, bytes]) -> list[dict]:
    """As ModelScope lists a repository."""
    return [
        {"Type": "blob", "Path": path, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
        for path, content in files.items()
    ]
