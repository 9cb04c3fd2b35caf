"""A stand-in for the Hub on 127.0.0.1: repositories in memory, LFS by content, commits, and faults on demand.

It answers the calls that huggingface_hub makes for models with HF_HUB_DISABLE_XET=1. Like the Hub it refuses
content that is not what its sha256 says, commits on another parent than the branch's head, commits of content
that never arrived, and cards whose base model is no Hub id.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"  # the one that may write
OWNER = "me"
_LFS_SUFFIXES = (".safetensors", ".bin", ".png")
_PART = 4096  # bytes read at a time, so that a connection can break in the middle of a small file


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(f"blob {len(self.data)}\0".encode() + self.data).hexdigest()  # as git names it


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{parent} {message} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, message, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch: str = "main") -> list[Commit]:
        """Return the branch's commits, newest first, without the first one, which every repository has."""
        commit, found = self.commits[self.branches[branch]], []
        while commit.parent is not None:
            found.append(commit)
            commit = self.commits[commit.parent]
        return found


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" the pattern matches.

    kind: "drop" (the connection breaks after `after` bytes of the body), "status" (an error is answered,
    nothing is done), "lost" (the request takes effect, then the connection breaks), "rival" (somebody else
    commits just before), "hold" (after `after` bytes nothing more is read until the test lets go).
    """

    pattern: str
    kind: str
    times: int = 1
    after: int = 0
    status: int = 503
    message: str = "try again later"
    hits: int = 0


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Dropped(Exception):
    pass


class Hub:
    """The server and its state; a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, int]] = []  # "METHOD /path", status (0: the connection broke)
        self.held = threading.Event()
        self.release = threading.Event()
        self.lock = threading.RLock()
        hub = self

        class Bound(_Handler):
            server_state = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(timeout=10)

    def head(self, repo_id: str, branch: str = "main") -> Commit:
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[branch]]

    def sent(self, pattern: str, *, since: int = 0) -> list[tuple[str, int]]:
        """Return the requests that match, in order."""
        return [entry for entry in self.requests[since:] if re.search(pattern, entry[0])]

    def fault_for(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.hits < fault.times and re.search(fault.pattern, line):
                    fault.hits += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    server_state: Hub
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for one read: no thread waits for ever

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""

    # One request ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        line = f"{self.command} {unquote(self.route)}"
        fault = self.server_state.fault_for(line)
        status = 0
        try:
            body = self._body(fault)
            status, content, headers = self._answer(fault, body)
            if fault is not None and fault.kind == "lost":
                status = 0
                raise Dropped
            self._send(status, content, headers)
        except (Dropped, ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            with self.server_state.lock:
                self.server_state.requests.append((line, status))

    def _body(self, fault: Fault | None) -> bytes:
        body = bytearray()
        for part in self._parts():
            body += part
            if fault is not None and fault.kind in ("drop", "hold") and len(body) >= fault.after:
                self._break(fault)
        if fault is not None and fault.kind in ("drop", "hold"):
            self._break(fault)
        return bytes(body)

    def _break(self, fault: Fault) -> None:
        if fault.kind == "hold":
            self.server_state.held.set()
            self.server_state.release.wait(timeout=60)
        raise Dropped

    def _parts(self) -> Any:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield self._read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            part = self._read(min(left, _PART))
            left -= len(part)
            yield part

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) != size:
            raise Dropped  # the client is gone in the middle of what it announced
        return data

    def _answer(self, fault: Fault | None, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        try:
            if fault is not None and fault.kind == "status":
                raise Refused(fault.status, fault.message)
            with self.server_state.lock:
                return self._dispatch(fault, body)
        except Refused as refused:
            if refused.message.startswith("<"):  # not from the Hub, but from what stands in between
                return refused.status, refused.message.encode(), {}
            headers = {"X-Error-Message": refused.message}
            if refused.code is not None:
                headers["X-Error-Code"] = refused.code
            return refused.status, json.dumps({"error": refused.message}).encode(), headers

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _dispatch(self, fault: Fault | None, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        name = r"(?P<repo>[\w.-]+/[\w.-]+)"
        routes = (
            ("POST", r"/api/repos/create", self._create),
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("POST", rf"/api/models/{name}/branch/(?P<revision>[^/]+)", self._branch),
            ("POST", rf"/api/models/{name}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<revision>[^/]+)", self._commit),
            ("GET", rf"/api/models/{name}/tree/(?P<revision>[^/]+)", self._tree),
            ("GET", rf"/api/models/{name}(/revision/(?P<revision>[^/]+))?", self._info),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self._put),
            ("HEAD|GET", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        )
        for method, pattern, action in routes:
            match = re.fullmatch(pattern, self.route)
            if match and re.fullmatch(method, self.command):
                given = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if action == self._commit and fault is not None and fault.kind == "rival":
                    self._rival(given["repo"], given["revision"])
                result = action(body, **given)
                return result if isinstance(result, tuple) else (200, json.dumps(result).encode(), {})
        raise Refused(404, f"no route for {self.command} {self.route}")

    # Who may do what --------------------------------------------------------------------------------------

    def _may_write(self) -> None:
        given = self.headers.get("Authorization")
        if given is None:
            raise Refused(401, "Invalid username or password.")
        if given != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def _repository(self, repo_id: str, *, write: bool = False) -> Repository:
        if write:
            self._may_write()
        repository = self.server_state.repositories.get(repo_id)
        hidden = repository is not None and repository.private
        if repository is None or (hidden and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repository

    def _revision(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Calls ------------------------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> Any:
        self._may_write()
        return {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def _create(self, body: bytes) -> Any:
        self._may_write()
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not repo_id.startswith(f"{OWNER}/"):
            raise Refused(403, f"You don't have the rights to create a model under {asked['organization']}")
        answer = {"url": f"{self.server_state.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server_state.repositories:
            return 409, json.dumps({**answer, "error": "You already created this model repo"}).encode(), {}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = self.server_state.repositories[repo_id] = Repository(private)
        repository.add(
            "main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}
        )
        return answer

    def _branch(self, body: bytes, repo: str, revision: str) -> Any:
        repository = self._repository(repo, write=True)
        if revision in repository.branches:
            raise Refused(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[revision] = self._revision(repository, start).sha
        return {}

    def _validate_yaml(self, body: bytes) -> Any:
        errors = card_errors(json.loads(body)["content"])
        status = 400 if errors else 200
        answer = {"errors": [{"message": text} for text in errors], "warnings": []}
        return status, json.dumps(answer).encode(), {}

    def _preupload(self, body: bytes, repo: str, revision: str) -> Any:
        there = self._revision(self._repository(repo, write=True), revision).files
        return {
            "files": [
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if asked["path"].endswith(_LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": there[asked["path"]].oid if asked["path"] in there else None,
                }
                for asked in json.loads(body)["files"]
            ]
        }

    def _batch(self, body: bytes, repo: str) -> Any:
        self._repository(repo, write=True)
        objects: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server_state.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server_state.endpoint}/lfs/{asked['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, f"content of {len(body)} bytes does not have the sha256 {oid}")
        self.server_state.blobs[oid] = body
        return {}

    def _commit(self, body: bytes, repo: str, revision: str) -> Any:
        repository = self._repository(repo, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self._revision(repository, revision)
        if revision not in repository.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if header.get("parentCommit") not in (None, head.sha):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                data = self.server_state.blobs.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    raise Refused(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = File(data, True)
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
        errors = card_errors(files["README.md"].data.decode()) if "README.md" in files else []
        if errors:
            raise Refused(400, "; ".join(errors))
        made = repository.add(revision, header["summary"], files)
        url = f"{self.server_state.endpoint}/{repo}/commit/{made.sha}"
        return {"commitUrl": url, "commitOid": made.sha, "hookOutput": "", "success": True}

    def _rival(self, repo: str, revision: str) -> None:
        repository = self.server_state.repositories[repo]
        files = {**self._revision(repository, revision).files, "rival.txt": File(b"me too\n", False)}
        repository.add(revision, "a rival's commit", files)

    def _info(self, body: bytes, repo: str, revision: str = "main") -> Any:
        repository = self._repository(repo)
        commit = self._revision(repository, revision)
        return {
            "id": repo,
            "modelId": repo,
            "sha": commit.sha,
            "private": repository.private,
            "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(commit.files)],
        }

    def _tree(self, body: bytes, repo: str, revision: str) -> Any:
        commit = self._revision(self._repository(repo), revision)
        return [self._entry(name, commit.files[name]) for name in sorted(commit.files)]

    def _entry(self, name: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(file.data), "oid": file.oid}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 134}
        return entry

    def _resolve(self, body: bytes, repo: str, revision: str, file: str) -> tuple[int, bytes, dict[str, str]]:
        commit = self._revision(self._repository(repo), revision)
        if file not in commit.files:
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha}
        found = commit.files[file]
        return 200, found.data, {"ETag": f'"{found.oid}"', "X-Repo-Commit": commit.sha}


def card_errors(text: str) -> list[str]:
    """Return what the Hub would not accept in a card's metadata."""
    match = re.match(r"\A---\n(.*?\n)??---(\n|\Z)", text, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1] or "") or {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    base, identifier = data.get("base_model"), r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
    bases = base if isinstance(base, list) else [base] if base is not None else []
    errors = [
        f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
        for name in bases
        if not re.fullmatch(identifier, str(name))
    ]
    sets = data.get("datasets") or []
    errors += [
        f'"datasets" holds "{name}", no id' for name in sets if not re.fullmatch(identifier, str(name))
    ]
    return errors
