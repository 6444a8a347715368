"""As much of an HTTP/2 client as sends requests and takes nothing in: headers as literals, no Huffman codes. Standard library only."""
import contextlib
import socket
import struct
import urllib.parse

DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """Without indexing; lengths below 127 (RFC 7541, 6.2.2)."""
    parts = [part.encode() for part in (name, value)]
    assert all(len(part) < 127 for part in parts)
    return b"\x00" + b"".join(bytes([len(part)]) + part for part in parts)


class Connection:
    def __init__(self, base, window):
        url = urllib.parse.urlsplit(base)
        self.host, self.stream = url.netloc, 1
        self.socket = socket.create_connection((url.hostname, url.port))
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
                            + frame(SETTINGS, ACK, 0))

    def post(self, path, body, headers):
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", self.host), *headers]
        block = b"".join(literal(*field) for field in fields)
        self.socket.sendall(frame(HEADERS, END_HEADERS, self.stream, block) + frame(DATA, END_STREAM, self.stream, body))
        self.stream += 2


@contextlib.contextmanager
def connect(base, window):
    connection = Connection(base, window)
    try:
        yield connection
    finally:
        connection.socket.close()
