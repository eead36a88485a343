"""A Hub on the loopback interface: enough of its HTTP protocol for huggingface_hub and for `from_pretrained`.

    with HubServer() as hub:
        hub.users["hf_token"] = User("ann")
        hub.faults.append(Fault("POST /api/models/.*/commit", 503))
        subprocess.run(..., env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1"})
        assert [commit.message for commit in hub.repositories["ann/model"].commits] == ["initial commit"]

Everything is in memory. What is sent is checked as the Hub checks it: who may do what, and that a large file has
arrived before a commit names it.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

CUT = "cut"  # the connection, when a part of the request has arrived
LOSE = "lose"  # the answer, after the request was carried out
HANG = "hang"  # neither answer nor close the connection


@dataclass
class User:
    name: str
    can_write: bool = True


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    parent: str = ""

    @property
    def oid(self) -> str:
        digest = hashlib.sha1(f"{self.parent} {self.message}".encode())
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


@dataclass
class Repository:
    """`commits` is the history of its main branch, the newest last."""

    is_private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", {".gitattributes": b"lfs"})])
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def main(self) -> Commit:
        return self.commits[-1]

    def find(self, revision: str) -> Commit | None:
        revision = self.main.oid if revision == "main" else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class Fault:
    """What goes wrong with a request whose "METHOD path" matches: a status, `CUT`, `LOSE` or `HANG`.

    The first `skip` matches are spared, and after `times` of them all is well again. The message quotes the token, to
    show that no user of the client repeats it.
    """

    pattern: str
    action: int | str
    skip: int = 0
    times: int = 1_000_000


class HubServer:
    def __init__(self):
        self.users: dict[str, User] = {}  # by token
        self.repositories: dict[str, Repository] = {}  # by OWNER/NAME
        self.large_files: dict[str, bytes] = {}  # by sha256
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD path"
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def note(self, request: str) -> int | str | None:
        """Log a request, and return what goes wrong with it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.match(fault.pattern, request):
                    if fault.skip > 0:
                        fault.skip -= 1
                    elif fault.times > 0:
                        fault.times -= 1
                        return fault.action
        return None


class _Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, **fields):
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.content = {"error": message, **fields}


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _hash(path: str, content: bytes) -> str:
    """What the Hub compares, so that a file that has not changed is not sent again; also the ETag."""
    return hashlib.sha256(content).hexdigest() if _is_large(path) else _git_hash(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer takes 40 ms

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        self.hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.note(f"{self.command} {path}")
        if fault == CUT:
            self._read_body(only_half=True)
            return self._close()
        body = self._read_body()
        if fault == HANG:
            self.hub.closing.wait()
            return self._close()
        try:
            if isinstance(fault, int):
                raise _Refused(fault, f"injected, with {self.headers.get('Authorization')}")
            headers, content = self._answer(path, body)
            status = 200
        except _Refused as refused:
            status, headers, content = refused.status, refused.headers, refused.content
        if fault == LOSE:
            return self._close()
        if not isinstance(content, bytes):
            headers = {"Content-Type": "application/json", **headers}
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self, only_half: bool = False) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while length := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(length))
                self.rfile.readline()
                if only_half:
                    return b"".join(chunks)
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length // 2 if only_half else length)

    def _close(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # ---- who may do what ----

    @property
    def _user(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def _check_write(self, owner: str) -> None:
        user = self._user
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        if user.name != owner or not user.can_write:
            raise _Refused(403, "You don't have the rights to write in this namespace")

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        owner = name.split("/")[0]
        if repository is None or (repository.is_private and (self._user is None or self._user.name != owner)):
            raise _Refused(404 if self._user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(owner)
        return repository

    # ---- the protocol ----

    def _answer(self, path: str, body: bytes) -> tuple[dict[str, str], dict | list | bytes]:
        repo, rev = r"([^/]+/[^/]+)", r"([^/]+)"
        routes = {
            "GET /api/whoami-v2": self._whoami,
            "POST /api/repos/create": self._create,
            "POST /api/validate-yaml": lambda body: ({}, {"errors": [], "warnings": []}),
            f"GET /api/models/{repo}/auth-check/write": self._check,
            f"GET /api/models/{repo}/refs": self._refs,
            f"GET /api/models/{repo}/tree/{rev}": self._tree,
            f"GET /api/models/{repo}/revision/{rev}": self._info,
            f"GET /api/models/{repo}": self._info,
            f"POST /api/models/{repo}/preupload/main": self._preupload,
            f"POST /api/models/{repo}/commit/main": self._commit,
            f"POST /api/models/{repo}/tag/{rev}": self._tag,
            rf"POST /{repo}\.git/info/lfs/objects/batch": self._batch,
            f"PUT /large/{rev}": self._put_large,
            f"POST /large/{rev}/verify": self._verify_large,
            f"(?:GET|HEAD) /{repo}/resolve/{rev}/(.+)": self._resolve,
        }
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(*match.groups(), body)
        raise _Refused(404, "Sorry, we can't find the page you are looking for.")

    def _whoami(self, body: bytes):
        user = self._user
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        return {}, {"type": "user", "name": user.name, "orgs": []}

    def _create(self, body: bytes):
        wanted = json.loads(body)
        owner = wanted["organization"]
        self._check_write(owner)
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            raise _Refused(409, "You already created this model repo", url=url)
        self.hub.repositories[name] = Repository(is_private=wanted.get("visibility") == "private")
        return {}, {"url": url, "name": name}

    def _check(self, name: str, body: bytes):
        self._repository(name, write=True)
        return {}, {}

    def _refs(self, name: str, body: bytes):
        repository = self._repository(name)
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.main.oid}
        return {}, {"branches": [main], "converts": [], "tags": tags}

    def _find(self, name: str, revision: str) -> tuple[Repository, Commit]:
        repository = self._repository(name)
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    def _info(self, name: str, *rest: str | bytes):
        repository, commit = self._find(name, rest[0] if len(rest) == 2 else "main")
        files = [{"rfilename": path} for path in sorted(commit.files)]
        return {}, {"id": name, "sha": commit.oid, "private": repository.is_private, "siblings": files}

    def _tree(self, name: str, revision: str, body: bytes):
        _, commit = self._find(name, revision)
        return {}, [
            {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            for path, content in sorted(commit.files.items())
        ]

    def _preupload(self, name: str, body: bytes):
        files = self._repository(name, write=True).main.files
        return {}, {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if _is_large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": _hash(path, files[path]) if path in files else None,
                }
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
        }

    def _batch(self, name: str, body: bytes):
        self._repository(name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                href = f"{self.hub.endpoint}/large/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {}, {"transfer": "basic", "objects": objects}

    def _put_large(self, oid: str, body: bytes):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content does not match its hash")
        self.hub.large_files[oid] = body
        return {}, b""

    def _verify_large(self, oid: str, body: bytes):
        if len(self.hub.large_files.get(oid, b"")) != json.loads(body)["size"]:
            raise _Refused(400, "the file has not arrived")
        return {}, {}

    def _commit(self, name: str, body: bytes):
        repository = self._repository(name, write=True)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", repository.main.oid) != repository.main.oid:
            raise _Refused(412, "A commit has happened since.")
        files = dict(repository.main.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.large_files:
                files[value["path"]] = self.hub.large_files[value["oid"]]
            else:
                raise _Refused(400, f"unexpected {operation}")
        repository.commits.append(Commit(header["value"]["summary"], files, repository.main.oid))
        oid = repository.main.oid
        return {}, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}

    def _tag(self, name: str, revision: str, body: bytes):
        repository = self._repository(name, write=True)
        _, commit = self._find(name, revision)
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            raise _Refused(409, f"Tag {tag} already exists")
        repository.tags[tag] = commit.oid
        return {}, {}

    def _resolve(self, name: str, revision: str, path: str, body: bytes):
        _, commit = self._find(name, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            refused = _Refused(404, "Entry not found", "EntryNotFound")
            refused.headers |= headers
            raise refused
        content = commit.files[path]
        headers["ETag"] = f'"{_hash(path, content)}"'
        if _is_large(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        return {"Content-Type": "application/octet-stream", **headers}, content
