"""A server on loopback that speaks OpenAI's chat completions and answers as told."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `replies`, the last one for ever: a text, a status, or a function."""

    daemon_threads = True

    def __init__(self):
        self.replies, self.requests, self.headers, self.active, self.most = ["Score: 5"], [], [], 0, 0
        self.delay, self.retry_after = 0.0, "0.05"
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def serving():
    """Such a server, which runs."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.active += 1
            server.most = max(server.most, server.active)
            server.requests.append(request)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
        time.sleep(server.delay)
        with server.lock:
            server.active -= 1
        reply = reply(request) if callable(reply) else reply
        if isinstance(reply, int):
            self.send(reply, json.dumps({"error": {"message": "no"}}))
        elif isinstance(reply, bytes):
            self.send(200, reply.decode())
        else:
            text, reason = reply if isinstance(reply, tuple) else (reply, "stop")
            choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
            self.send(
                200,
                json.dumps(
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 1,
                        "model": "m",
                        "choices": [choice],
                        "usage": usage,
                    }
                ),
            )

    def send(self, status, body):
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass
