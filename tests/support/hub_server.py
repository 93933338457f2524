"""A stand-in for the Hugging Face Hub: what `snapshot_download` asks of it, for folders of this machine."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator


class Hub:
    """Repositories by "owner/name": revisions by branch or tag, and folders by commit.

    Attributes:
        extra_paths: names that a listing holds besides, as of a hostile server.
        requests: lines of all requests and their Authorization headers.
    """

    def __init__(self):
        self.revisions: dict[tuple[str, str], str] = {}
        self.commits: dict[str, pathlib.Path] = {}
        self.status: dict[str, tuple[int, str]] = {}  # by repository: an error and its X-Error-Code
        self.extra_paths: list[str] = []
        self.requests: list[str] = []

    def publish(self, repository: str, folder: pathlib.Path, revision: str = "main") -> str:
        """The commit by which `revision` is `folder` now."""
        commit = hashlib.sha1(f"{repository} {folder} {revision}".encode()).hexdigest()
        self.revisions[repository, revision] = commit
        self.commits[commit] = folder
        return commit

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The value for $HF_ENDPOINT."""
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(request.path).path)
        self.requests.append(f"{request.command} {path} {request.headers['Authorization']}")
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision", *revision]:
                repository = f"{owner}/{name}"
                commit = self.revisions.get((repository, "/".join(revision)))
                if repository in self.status:
                    status, code = self.status[repository]
                    return self.send(request, status, {"error": code}, {"X-Error-Code": code})
                if not any(repository == known for known, _ in self.revisions):
                    return self.send(request, 404, {}, {"X-Error-Code": "RepoNotFound"})
                if commit is None:
                    return self.send(request, 404, {}, {"X-Error-Code": "RevisionNotFound"})
                return self.send(request, 200, {"id": repository, "sha": commit, "siblings": []})
            case ["api", "models", _, _, "tree", commit]:
                folder = self.commits[commit]
                files = [p for p in folder.rglob("*") if p.is_file()]
                entries = [
                    {"path": file.relative_to(folder).as_posix(), "size": file.stat().st_size}
                    for file in files
                ] + [{"path": path, "size": 1} for path in self.extra_paths]
                listing = [{"type": "file", "oid": etag(e["path"]), **e} for e in entries]
                return self.send(request, 200, listing)
            case [_, _, "resolve", commit, *name]:
                file = self.commits[commit].joinpath(*name)
                content = file.read_bytes() if file.is_file() else b"x"
                about = {"ETag": f'"{etag("/".join(name) + commit)}"', "X-Repo-Commit": commit}
                return self.send(request, 200, content, about)
        return self.send(request, 404, {})

    def send(self, request, status: int, content: bytes | object, headers=()) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for name, value in dict(headers).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()
