"""A loopback proxy between a client and an object store that damages answers, one by one, according to a plan.

with FaultProxy(store.port) as proxy:       # proxy.url is the client's endpoint
    proxy.plan = [Fault("cut", 1000), None]   # for the next matching requests; those after them get proxy.always
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

PIECE = 1 << 16
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"  # with the status 403
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, on, no seconds: closing sends RST


@dataclass(frozen=True)
class Fault:
    """One way to damage an answer.

    cut, reset, stall: after `at` bytes of the body the connection is closed, reset, or left open without data.
    flip: one bit of byte `at` of the body is inverted. slow: `at` bytes per second. drop: no answer.
    lost: the request is executed, and its answer dropped. status: the answer is the error `at`, without a request.
    """

    kind: Literal["cut", "reset", "stall", "flip", "slow", "drop", "lost", "status"]
    at: int = 0


@dataclass(frozen=True)
class Request:
    """A request of a client, and the fault of its answer."""

    method: str
    path: str  # with the query
    fault: Fault | None


def is_download(method: str, path: str) -> bool:
    """Return whether a request reads an object, as opposed to listing or uploading."""
    return method == "GET" and "?" not in path


@dataclass
class FaultProxy:
    """The proxy, a context manager; `plan` and `always` may be changed at any time.

    Args:
        port: loopback port of the store.
        matches: returns for a method and a path whether the request takes the next fault.
        plan: faults of the next matching requests, in order; None for an undamaged answer.
        always: fault of all matching requests after those of the plan.
        requests: all requests so far.
    """

    port: int
    matches: Callable[[str, str], bool] = is_download
    plan: list[Fault | None] = field(default_factory=list)
    always: Fault | None = None
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> FaultProxy:
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.socket.close()  # server_close would wait for idle connections of clients

    def take(self, method: str, path: str) -> Fault | None:
        """Record a request and return its fault."""
        with self.lock:
            fault = None
            if self.matches(method, path):
                fault = self.plan.pop(0) if self.plan else self.always
            self.requests.append(Request(method, path, fault))
            return fault

    @property
    def downloads(self) -> list[str]:
        """The paths of all object reads so far."""
        return [request.path for request in self.requests if is_download(request.method, request.path)]


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # clients may disconnect at any time
            super().handle()

    def forward(self) -> None:
        fault = self.proxy.take(self.command, self.path)
        body = self.request_body()
        if fault and fault.kind == "drop":
            self.close_connection = True
        elif fault and fault.kind == "status":
            self.answer(fault.at, [("Content-Type", "application/xml")], DENIED if fault.at == 403 else BUSY, None)
        else:
            self.answer(*self.ask_store(body), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def request_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return body

    def ask_store(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=60)
        try:
            # Headers are passed on unchanged: the signature covers them, the host included.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection", "transfer-encoding", "content-length"):
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault | None) -> None:
        kind, at = (fault.kind, fault.at) if fault else (None, 0)
        if kind == "lost":
            self.close_connection = True
            return
        self.send_response_only(status)
        sizes = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", sizes[0] if self.command == "HEAD" and sizes else str(len(body)))
        self.end_headers()
        if kind == "flip" and at < len(body):
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if kind in ("cut", "reset", "stall") and at < len(body):
            self.wfile.write(body[:at])
            self.close_connection = True
            if kind == "reset":
                time.sleep(0.05)  # a reset discards bytes that are not delivered yet
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                self.connection.close()
            if kind == "stall":
                self.proxy.closing.wait()
            return
        piece = max(1, at // 20) if kind == "slow" else PIECE
        for start in range(0, len(body), piece):
            self.wfile.write(body[start : start + piece])
            if kind == "slow":
                time.sleep(0.05)

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the connection was reset
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; see `FaultProxy.requests`."""
