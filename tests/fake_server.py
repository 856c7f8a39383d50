"""A small OpenAI-compatible server on loopback that fails on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STOP_TOKEN = 2


@dataclass
class Fault:
    """What to send instead of an answer. `hang_s` is how long to keep silent first. `raw` is sent as it is,
    as a body of `content_type`."""

    status: int = 500
    message: str = "out of order"
    headers: dict[str, str] = field(default_factory=dict)
    hang_s: float = 0.0
    raw: bytes | None = None
    content_type: str = "application/json"


@dataclass
class FakeServer:
    """State of a server. `fault(body, n)` may return a fault for the n-th request (from 0) to it."""

    model: str = "fake"
    owned_by: str = "vllm"
    max_model_len: int | None = 4096
    key: str | None = None
    loading: int = 0  # how often it says that it is not ready yet
    gather: int = 0  # no answer before so many requests have been in flight at once
    patience_s: float = 10.0  # or so many seconds have passed
    finish_reason: str | None = "stop"
    fault: Callable[[dict[str, Any], int], Fault | None] = lambda body, n: None
    url: str = ""
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (path, body) of every request
    busiest: int = 0  # most requests in flight at one time
    _now: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_until(self, condition: Callable[["FakeServer"], bool], timeout_s: float = 10.0) -> None:
        """Returns once the condition holds, which is looked at when a request comes or is answered."""
        with self._changed:
            self._changed.wait_for(lambda: condition(self), timeout_s)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Echoes the prompt; its length is in the token ids, so answers can be told apart."""
        if path.endswith("/chat/completions"):
            text = "chat:" + body["messages"][-1]["content"]
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": []}]}
        else:
            text = f"text:{body['prompt']}"
            choice = {"text": text}
            if body.get("logprobs") is not None:
                choice["logprobs"] = {"token_logprobs": [-0.5, -0.25, -0.125], "tokens": ["a", "b", "c"]}
        if body.get("return_token_ids"):
            choice["token_ids"] = [10, 11, STOP_TOKEN]
        choice |= {"index": 0, "finish_reason": self.finish_reason}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        return {
            "id": "1",
            "object": "x",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": usage,
        }


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """Serves `server` on a free port while the context is open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                self.send(401, {"error": {"message": f"bad key {self.headers['Authorization']}"}})
                return
            if server.loading:
                server.loading -= 1
                self.send(503, {"error": {"message": "loading model"}})
                return
            entry = {"id": server.model, "object": "model", "created": 0, "owned_by": server.owned_by}
            if server.max_model_len:
                entry["max_model_len"] = server.max_model_len
            self.send(200, {"object": "list", "data": [entry]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server._changed:
                n = len(server.bodies)
                server.bodies.append((self.path, body))
                server._now += 1
                server.busiest = max(server.busiest, server._now)
                server._changed.notify_all()
            fault = server.fault(body, n)
            if fault:
                time.sleep(fault.hang_s)
            server.wait_until(lambda s: s.busiest >= s.gather, server.patience_s)
            with server._changed:
                server._now -= 1
            if fault and fault.raw is not None:
                self.send_body(fault.status, fault.raw, fault.content_type, fault.headers)
            elif fault:
                message = fault.message.replace("{key}", self.headers["Authorization"])
                self.send(fault.status, {"error": {"message": message}}, fault.headers)
            else:
                self.send(200, server.answer(self.path, body))

        def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            self.send_body(status, json.dumps(body).encode(), "application/json", headers or {})

        def send_body(self, status: int, data: bytes, content_type: str, headers: dict[str, str]) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up, which some tests want

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True
        block_on_close = False

    http = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
