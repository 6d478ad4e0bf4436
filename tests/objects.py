"""An S3 server and a web server on this machine, behind a proxy that fails when told to."""

from __future__ import annotations

import http.client
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

_XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
_ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "403": (403, "AccessDenied", "Access Denied"),
}


class Faults:
    """Which requests fail, by their count.

    Parameters
    ----------
    method, path
        Regular expressions; only requests that match both are counted.
    at
        Number of a request, from 1 → ``"500"``, ``"503"``, ``"403"``, ``"drop"``, or ``"silence"``, which is not answered.
    ever_after
        ``(number, kind)``: all from this one on.
    """

    def __init__(self, method=".*", path=".*", *, at=None, ever_after=None):
        self._pattern = re.compile(method), re.compile(path)
        self._at, self._ever_after = at or {}, ever_after
        self._lock = threading.Lock()
        self.count = 0
        self.made = []

    def kind_of(self, method, path):
        if not (self._pattern[0].fullmatch(method) and self._pattern[1].search(path)):
            return None
        with self._lock:
            self.count += 1
            kind = self._at.get(self.count)
            if self._ever_after and self.count >= self._ever_after[0]:
                kind = self._ever_after[1]
            if kind:
                self.made.append((method, path, kind))
        return kind


class Proxy(ThreadingHTTPServer):
    """Hands requests on to another server of this machine, or fails as `faults` says; logs them."""

    daemon_threads = True

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.over = port, threading.Event()
        self.reset()

    def reset(self):
        self.faults = Faults()
        self.log = []

    def requests(self, method, path=""):
        return [asked for verb, asked in self.log if verb == method and re.search(path, asked)]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that goes away is its own business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def log_message(self, *args):
        pass

    def handle_expect_100(self):
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    def _serve(self):
        self.server.log.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.server.faults.kind_of(self.command, self.path)
        if kind in _ERRORS:
            status, code, message = _ERRORS[kind]
            self._answer(status, [("Content-Type", "application/xml")], _XML.format(code, message).encode())
            return
        if kind == "silence":
            self.server.over.wait()
        if kind == "silence" or (kind == "drop" and self.command != "GET"):
            self.close_connection = True
            return
        onward = http.client.HTTPConnection("127.0.0.1", self.server.target)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        onward.request(self.command, self.path, body, headers)
        response = onward.getresponse()
        self._answer(response.status, response.getheaders(), response.read(), dropped=kind == "drop")
        onward.close()

    def _answer(self, status, headers, body, *, dropped=False):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), len(body))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if dropped else body)
        self.wfile.flush()
        self.close_connection = self.close_connection or dropped

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)


@contextmanager
def served(server):
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        if isinstance(server, Proxy):
            server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Files(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def list_directory(self, path):
        self.send_error(404)


def file_server(folder):
    """A web server of the files in a folder, without listings."""
    return ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Files(*args, directory=str(folder)))
