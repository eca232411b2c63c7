"""A server on loopback that keeps one repository of models, as far as an upload to the Hugging Face hub asks for it."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """`files` is what the repository holds, `made` how it was asked for; requests to `refused` get 403."""

    daemon_threads = True

    def __init__(self):
        self.files, self.blobs, self.made, self.tokens, self.refused = {}, {}, [], set(), "nothing"
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, method, path, body):
        """Of the hub's API; see the functions of the same names in huggingface_hub's _commit_api.py and lfs.py."""
        if method == "PUT":
            self.blobs[path.rpartition("/")[2]] = body
            return {}
        if "/tree/" in path:
            return [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return {"url": f"{self.url}/me/model", "id": "me/model"}
        if "/preupload/" in path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            return {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.url}/blobs/{each['oid']}"}} for each in objects]
            return {"objects": [{**each, "actions": action} for each, action in zip(objects, actions, strict=True)]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                self.commit(line["key"], line["value"])
            return {"commitUrl": f"{self.url}/me/model/commit/1", "commitOid": "1"}
        return {}

    def commit(self, key, value):
        if key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self.blobs[value["oid"]]
        elif key == "deletedFile":
            del self.files[value["path"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization")
        self.server.tokens |= {token} - {None}
        if self.server.refused in self.path:
            return self.send(403, {"error": f"Forbidden for {token}\nread\x1b[2J the docs"})
        return self.send(200, self.server.answer(self.command, self.path, body))

    do_GET = do_PUT = do_POST

    def chunk(self):
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    """Such a server, which runs."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()
