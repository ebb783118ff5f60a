"""Each fault of the proxy is the one that its name says, seen by a plain client; without one nothing is changed."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.fault_proxy import Fault, FaultProxy

BODY = bytes(range(256)) * 400


class Store(BaseHTTPRequestHandler):
    """Gives BODY for whatever is asked, and takes what it is given."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0))) or BODY
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Seen-Host", self.headers["Host"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = answer

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    store = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True).start()
    with FaultProxy(store.server_port) as proxy:
        yield proxy
    store.shutdown()
    store.socket.close()


def ask(proxy: FaultProxy, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes, str | None]:
    """Status, body and the host that the store saw."""
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=0.5)
    try:
        connection.request(method, "/bucket/name", body)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers["Seen-Host"]
    finally:
        connection.close()


def test_without_a_fault_nothing_is_changed(proxy: FaultProxy) -> None:
    host = proxy.url.removeprefix("http://")
    assert ask(proxy) == (200, BODY, host)
    assert ask(proxy, "PUT", b"content") == (200, b"content", host)
    assert ask(proxy, "HEAD") == (200, b"", host)
    assert [request.method for request in proxy.requests] == ["GET", "PUT", "HEAD"]
    assert proxy.downloads == ["/bucket/name"]


@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
def test_a_body_ends_early(proxy: FaultProxy, kind: str) -> None:
    proxy.plan = [Fault(kind, 1000)]  # type: ignore[arg-type]
    expected = {"cut": http.client.IncompleteRead, "reset": ConnectionResetError, "stall": TimeoutError}[kind]
    with pytest.raises(expected):
        ask(proxy)
    assert ask(proxy)[1] == BODY, "the next one is whole"


def test_one_bit_is_flipped(proxy: FaultProxy) -> None:
    proxy.plan = [Fault("flip", 77)]
    body = ask(proxy)[1]
    assert [place for place in range(len(BODY)) if body[place] != BODY[place]] == [77] and body[77] ^ BODY[77] == 1


@pytest.mark.parametrize("kind", ["drop", "lost"])
def test_no_answer(proxy: FaultProxy, kind: str) -> None:
    proxy.plan = [Fault(kind)]  # type: ignore[arg-type]
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy)


def test_an_error_is_answered_and_a_slow_body_is_slow(proxy: FaultProxy) -> None:
    proxy.plan, proxy.always = [Fault("status", 503)], Fault("slow", len(BODY) * 4)
    assert ask(proxy)[0] == 503
    began = time.monotonic()
    assert ask(proxy)[1] == BODY and time.monotonic() - began > 0.2
    assert ask(proxy, "PUT", b"1")[1] == b"1", "only downloads take faults"
    assert [request.fault and request.fault.kind for request in proxy.requests] == ["status", "slow", None]
