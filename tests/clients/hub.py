"""A hub in this process: the routes by which huggingface_hub, and `tandem`, get files (its `hf_api.py` and `file_download.py`).
Large files are redirected to another path, as the real one's storage is, and their transfer can be made to break off."""

import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Of the branch of data sets that were converted.
CONVERTED, ITS_COMMIT = "refs/convert/parquet", "f" * 40
TOKEN = "hf_known"
LARGE = ".safetensors"


def etag(file, content):
    """The SHA-256 of a large file, git's own hash of a small one."""
    if file.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """`repositories`: name -> file -> content; names of data sets begin with `datasets/`, and end with `@refs/convert/parquet` for
    that branch. A name that begins with `gated/` wants TOKEN."""

    def __init__(self, repositories):
        self.repositories = repositories
        self.asked = []  # (method, path, Range)
        self.break_after = []  # bytes after which the next transfers of large files break off
        self.damage = False
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def end(self):
        self.server.shutdown()
        self.server.server_close()

    def ranges(self, part):
        return [wanted for method, path, wanted in self.asked if method == "GET" and part in path]

    def answer(self, request):
        path = urllib.parse.unquote(request.path.split("?")[0])
        self.asked.append((request.command, path, request.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[0] == "storage":
            return self.send_large(request, self.repositories["/".join(parts[1:3])]["/".join(parts[3:])])
        kind = "datasets/" if "datasets" in parts[:2] else ""
        if parts[0] == "datasets":
            parts = parts[1:]
        if parts[0] == "api":
            # .../revision/REVISION, and newer clients' .../tree/REVISION.
            name, listing, revision, file = "/".join(parts[2:4]), parts[4], "/".join(parts[5:]), None
        else:
            name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        name, commit = kind + name, COMMIT
        if revision in (CONVERTED, ITS_COMMIT) and f"{name}@{CONVERTED}" in self.repositories:
            name, revision, commit = f"{name}@{CONVERTED}", "main", ITS_COMMIT
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return self.refuse(request, 401, "", "Invalid credentials in Authorization header")
        if name not in self.repositories:
            return self.refuse(request, 404 if token else 401, "RepoNotFound", "Repository not found")
        if revision not in ("main", COMMIT):
            return self.refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name.startswith("gated/") and not token and file is not None:
            return self.refuse(request, 401, "GatedRepo", f"Access to model {name} is restricted.")
        files = self.repositories[name]
        if file is None:
            entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": etag(file, files[file])} for file in files]
            about = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.send(request, 200, json.dumps(about if listing == "revision" else entries).encode())
        if file not in files:
            return self.refuse(request, 404, "EntryNotFound", "Entry not found")
        content = files[file]
        headers = {"X-Repo-Commit": commit}
        if not file.endswith(LARGE):
            headers["ETag"] = f'"{etag(file, content)}"'
            return self.send(request, 200, content, headers)
        headers["X-Linked-ETag"] = f'"{etag(file, content)}"'
        headers["X-Linked-Size"] = str(len(content))
        # Another host, as its storage is.
        headers["Location"] = f"{self.url}/storage/{name}/{file}".replace("127.0.0.1", "localhost")
        self.send(request, 302, b"", headers)

    def send_large(self, request, content):
        headers, status, start = {"Accept-Ranges": "bytes"}, 200, 0
        wanted = request.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = content[start:]
        if self.damage:
            sent = bytes([sent[0] ^ 1]) + sent[1:]
        breaks = self.break_after.pop(0) if self.break_after and request.command == "GET" else None
        self.send(request, status, sent, headers, breaks)

    def refuse(self, request, status, code, message):
        self.send(request, status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, request, status, content, headers={}, breaks=None):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "HEAD":
            return
        try:
            request.wfile.write(content[:breaks])
        except ConnectionError:
            pass
        if breaks is not None:
            request.close_connection = True
