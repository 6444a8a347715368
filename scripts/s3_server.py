"""An S3 server on a folder, as much of one as proofs need: it may be killed and frozen and keeps what it acknowledged. Nobody
needs to sign, and there is one bucket, whatever it is called. Standard library only.

usage: s3_server.py FOLDER PORT
"""
import hashlib
import http.server
import os
import pathlib
import re
import sys
import tempfile
import urllib.parse
import xml.sax.saxutils

PARTS = ".parts"  # uploads under way, beside the objects


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = pathlib.Path()

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        headers.setdefault("Content_Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def xml(self, text):
        self.answer(200, b'<?xml version="1.0" encoding="UTF-8"?>' + text.encode(), Content_Type="application/xml")

    def missing(self):
        self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>", Content_Type="application/xml")

    def parsed(self):
        """Key and query of the request."""
        url = urllib.parse.urlsplit(self.path)
        _, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        if ".." in key.split("/"):
            raise ValueError(key)
        return key, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def body(self):
        left, hashed = int(self.headers.get("Content-Length", 0)), hashlib.md5()
        handle, path = tempfile.mkstemp(dir=self.folder / PARTS)
        with open(handle, "wb") as file:
            while left:
                piece = self.rfile.read(min(left, 1 << 20))
                if not piece:
                    raise ConnectionError("the body was cut")
                file.write(piece)
                hashed.update(piece)
                left -= len(piece)
        return path, hashed.hexdigest()

    def place(self, key, path):
        """An object appears whole or not at all."""
        target = self.folder / "objects" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)

    def do_PUT(self):
        key, query = self.parsed()
        path, digest = self.body()
        if "uploadId" in query:
            os.replace(path, self.folder / PARTS / f"{query['uploadId']}.{int(query['partNumber']):06}")
        elif key:
            self.place(key, path)
        self.answer(200, ETag=f'"{digest}"')

    def do_POST(self):
        key, query = self.parsed()
        path, _ = self.body()
        if "uploads" in query:
            os.unlink(path)
            name = os.path.basename(path)
            return self.xml(f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>")
        if "uploadId" in query:
            parts = sorted((self.folder / PARTS).glob(query["uploadId"] + ".*"))
            with open(path, "wb") as whole:
                for part in parts:
                    whole.write(part.read_bytes())
            self.place(key, path)
            for part in parts:
                part.unlink()
            return self.xml('<CompleteMultipartUploadResult><ETag>"parts"</ETag></CompleteMultipartUploadResult>')
        keys = [xml.sax.saxutils.unescape(key) for key in re.findall("<Key>(.*?)</Key>", pathlib.Path(path).read_text())]
        os.unlink(path)
        for key in keys:
            (self.folder / "objects" / key).unlink(missing_ok=True)
        self.xml("<DeleteResult>" + "".join(f"<Deleted><Key>{xml.sax.saxutils.escape(key)}</Key></Deleted>" for key in keys) + "</DeleteResult>")

    def do_DELETE(self):
        key, query = self.parsed()
        if "uploadId" in query:
            for part in (self.folder / PARTS).glob(query["uploadId"] + ".*"):
                part.unlink()
        else:
            (self.folder / "objects" / key).unlink(missing_ok=True)
        self.answer(204)

    def do_GET(self):
        key, query = self.parsed()
        if not key:
            return self.list(query.get("prefix", ""))
        try:
            content = (self.folder / "objects" / key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return self.missing()
        about = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last_Modified": "Mon, 30 Nov 2026 00:00:00 GMT"}
        self.answer(200, content, **about)

    do_HEAD = do_GET

    def list(self, prefix):
        root, found = self.folder / "objects", ""
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            key = path.relative_to(root).as_posix()
            if key.startswith(prefix):
                found += f"<Contents><Key>{xml.sax.saxutils.escape(key)}</Key><LastModified>2026-11-30T00:00:00.000Z</LastModified>" \
                         f"<ETag>\"x\"</ETag><Size>{path.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        self.xml(f"<ListBucketResult><Name>bucket</Name><Prefix>{xml.sax.saxutils.escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
                 f"{found}</ListBucketResult>")


def main(folder, port):
    Handler.folder = pathlib.Path(folder)
    for name in ("objects", PARTS):
        (Handler.folder / name).mkdir(parents=True, exist_ok=True)
    http.server.ThreadingHTTPServer.request_queue_size = 128
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
