"""An S3 server, moto's, in a process of its own, that fails requests to order.

    with running_store() as store:
        remote = store.upload(folder, "a")
        store.inject({"path": "shard.00001", "kind": "500", "times": 2})

A fault has these items:
    path: a regular expression, searched for in "/bucket/key". Only GET and HEAD of objects can fail.
    kind: "500", "503", "404", "403": an answer with S3's error code; the only kinds that change a HEAD.
        "reset": half of the body, then a broken connection.
        "short": half of the body, then the connection's usual end.
        "stall": half of the body, and the rest after `seconds`.
        "slow": the body in small pieces over `seconds`.
        "truncate": half of the body, with headers as if that were all.
        "flip": the body with another bit in the middle.
    times: how many requests fail; None, the default: all.
    skip: how many matching requests pass before; 0 by default.
    methods: ["GET"] by default.
    seconds: for "stall" and "slow".
The first fault that applies to a request is injected; those after it in the list don't count this request.

What one `download` of streaming 0.13's S3 downloader asks for until it raises (boto3 1.44), after one HEAD (3 if it
is HEAD that fails with "500" or "503"):
    "500": 3 GET in under 1 s. "503": 3 GET in 1 to 5 s, and this client is slow for some seconds after it.
    "404", "403": 1 GET.
    "reset", "short": 5 GET in under 1 s. "stall": 5 GET, each for the timeout, which is the longest pause between
    pieces: "slow" gets through. Without even headers it would be 3 times 5 GET.
    "truncate", "flip": 1 GET, no error. An object of 8 MB or more is read, and damaged, in parts of 8 MB.
With one fewer GET in `times`, the download succeeds. A stream calls `download` up to `download_retry` times.
"""

import contextlib
import json
import logging
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from werkzeug.wrappers import Request, Response

BUCKET = "bucket"
CONTROL = "/__faults__"
ERRORS = {"500": "InternalError", "503": "SlowDown", "404": "NoSuchKey", "403": "AccessDenied"}
KINDS = {*ERRORS, "reset", "short", "stall", "slow", "truncate", "flip"}
PIECES = 20
"""Of a slow body."""
HEADERS = {
    "Authorization": "AWS test:test",  # moto doesn't check it, but lets nobody delete without
    "Content-Type": "application/octet-stream",
    "x-amz-sdk-checksum-algorithm": "CRC32",  # gives objects a checksum; in S3 all have one
}


@dataclass
class Fault:
    """See above; and how many matching requests it has seen and failed."""

    path: str
    kind: str
    times: int | None = None
    skip: int = 0
    methods: list[str] = field(default_factory=lambda: ["GET"])
    seconds: float = 0.0
    seen: int = 0
    injected: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of fault: {self.kind}")

    def take(self, method: str, path: str) -> bool:
        """Whether to fail this request."""
        if method not in self.methods or not re.search(self.path, path):
            return False
        self.seen += 1
        if self.seen <= self.skip or self.injected == self.times:
            return False
        self.injected += 1
        return True


class FaultyApp:
    """A WSGI application that answers as another one does, or with a fault."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = Request(environ)
        response = self.control(request) if request.path == CONTROL else self.answer(request)
        return response(environ, start_response)

    def control(self, request: Request) -> Response:
        """Take new faults, forget everything, or tell what happened."""
        with self.lock:
            if request.method == "POST":
                self.faults = [Fault(**fault) for fault in json.loads(request.data)]
            elif request.method == "DELETE":
                self.faults, self.requests = [], []
            return Response(json.dumps({"faults": [asdict(fault) for fault in self.faults], "requests": self.requests}))

    def answer(self, request: Request) -> Response:
        fault = self.choose(request.method, request.path)
        response = Response.from_app(self.app, request.environ, buffered=True)
        if fault and fault.kind in ERRORS:
            return Response(f"<Error><Code>{ERRORS[fault.kind]}</Code></Error>", int(fault.kind))
        if fault and request.method == "GET":
            if fault.kind in ("truncate", "flip"):
                damage(response, fault.kind)
            else:
                response.response = send(response.data, fault, request.environ["werkzeug.socket"])
        return response

    def choose(self, method: str, path: str) -> Fault | None:
        """The fault of a request, which goes into the log."""
        if method not in ("GET", "HEAD") or not re.fullmatch("/[^/]+/.+", path):
            return None
        with self.lock:
            fault = next((fault for fault in self.faults if fault.take(method, path)), None)
            self.requests.append({"path": path, "method": method, "fault": fault and fault.kind})
        return fault


def damage(response: Response, kind: str) -> None:
    """Change the body, and leave no checksum to find it out by."""
    for name in [name for name, _ in response.headers if name.lower().startswith("x-amz-checksum-")]:
        del response.headers[name]
    body = response.data
    middle = len(body) // 2
    flipped = bytes(byte ^ 1 for byte in body[middle : middle + 1])
    response.data = body[:middle] + (flipped + body[middle + 1 :] if kind == "flip" else b"")


def send(body: bytes, fault: Fault, connection: socket.socket) -> Iterator[bytes]:
    """The pieces of a body whose length has been announced."""
    middle = len(body) // 2
    if fault.kind == "slow":
        for i in range(PIECES):
            time.sleep(fault.seconds / PIECES)
            yield body[i * len(body) // PIECES : (i + 1) * len(body) // PIECES]
        return
    yield body[:middle]
    if fault.kind == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionResetError  # and so the server closes the connection
    if fault.kind == "stall":
        time.sleep(fault.seconds)
        yield body[middle:]


def serve() -> None:
    """Print the port, and serve until stdin ends."""
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, FaultyApp(create_backend_app("s3")), threaded=True)
    server.shutdown_request = server.close_request  # type: ignore[method-assign]  # or FIN comes before RST
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()


@dataclass
class Store:
    """The client of a running store."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What makes boto3 use this store."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        return {"S3_ENDPOINT_URL": self.endpoint, **keys, "AWS_EC2_METADATA_DISABLED": "true"}

    def upload(self, folder: Path, name: str) -> str:
        """Put all files of a folder; returns where to read them."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"s3://{BUCKET}/{name}"

    def put(self, key: str, content: bytes) -> None:
        self.request("PUT", f"/{BUCKET}/{key}", content)

    def delete(self, key: str) -> None:
        self.request("DELETE", f"/{BUCKET}/{key}")

    def inject(self, *faults: dict[str, Any]) -> None:
        """From now on, these faults and no others."""
        self.request("POST", CONTROL, json.dumps([asdict(Fault(**fault)) for fault in faults]).encode())

    def clear(self) -> None:
        """Forget all faults and requests."""
        self.request("DELETE", CONTROL)

    def injected(self) -> list[int]:
        """How many requests each fault failed."""
        return [fault["injected"] for fault in self.report()["faults"]]

    def requests(self) -> list[dict[str, Any]]:
        """Each GET and HEAD of an object: its path, method, and the kind of its fault or None."""
        return self.report()["requests"]

    def report(self) -> dict[str, list[dict[str, Any]]]:
        """All that `control` tells."""
        report: dict[str, list[dict[str, Any]]] = json.loads(self.request("GET", CONTROL))
        return report

    def request(self, method: str, path: str, content: bytes = b"") -> bytes:
        """The body of the answer, which has to be a success."""
        request = urllib.request.Request(self.endpoint + path, content or None, HEADERS, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: bytes = response.read()
        return answer


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    """Start a store, and end it."""
    command, root, pipe = [sys.executable, "-m", "tests.support.store"], Path(__file__).parents[2], subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, process_group=0) as process:
        try:
            assert process.stdout and select.select([process.stdout], [], [], 60)[0], "the store doesn't start"
            store = Store(int(process.stdout.readline()))
            store.request("PUT", f"/{BUCKET}")
            yield store
        finally:
            process.kill()  # the end of stdin may be far: children of this process have a copy


if __name__ == "__main__":
    serve()
