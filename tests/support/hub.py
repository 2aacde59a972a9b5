"""A hub of models on this machine, which speaks the part of Hugging Face's interface that downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Hub:
    """Repositories, each a folder with one commit, and what was asked of them."""

    repositories: dict[str, Path]
    """``models/org/name`` or ``datasets/org/name`` → folder."""
    address: str = ""
    requests: list[str] = field(default_factory=list)
    """Method and path, in order."""

    def commit(self, name: str) -> str:
        """The number of the repository's one commit."""
        return hashlib.sha1(name.encode()).hexdigest()

    def downloads(self, file: str) -> int:
        """How often a file's content was sent."""
        return sum(line.startswith("GET") and line.endswith(f"/{file}") for line in self.requests)


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serves the repositories on the loopback interface."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Says nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                self._describe("/".join(parts[1:4]), parts[4:])
            else:
                at = parts.index("resolve")
                kind = parts[0] if parts[0] == "datasets" else "models"
                self._file(f"{kind}/{'/'.join(parts[at - 2 : at])}", parts[at + 1], "/".join(parts[at + 2 :]))

        def _describe(self, name: str, rest: list[str]) -> None:
            folder = hub.repositories.get(name)
            if folder is None:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            if rest[:1] == ["tree"]:
                entries = [
                    {
                        "type": "file",
                        "path": str(path.relative_to(folder)),
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in files
                ]
                self._answer(200, json.dumps(entries).encode())
            elif rest[:1] == ["revision"] and rest[1] not in ("main", "v1", hub.commit(name)):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
                short = name.partition("/")[2]
                about = {"id": short, "modelId": short, "sha": hub.commit(name), "siblings": siblings}
                self._answer(200, json.dumps(about).encode())

        def _file(self, name: str, revision: str, file: str) -> None:
            content = (hub.repositories[name] / file).read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self._answer(200, content, {"X-Repo-Commit": hub.commit(name), "ETag": f'"{etag}"'})

        def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
