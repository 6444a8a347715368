"""One forward and backward of Tinker's API in protobuf, by hand, so that proofs need no SDK."""
import struct


def varint(n):
    out = b""
    while n > 0x7F:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def field(number, content):
    """A message, a string or bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(tag, n):
    return varint(tag << 3) + varint(n)


def forward_backward(model, seq, tokens):
    """Cross-entropy of each token by those before it."""
    inputs, targets = tokens[:-1], tokens[1:]

    def tensor(name, data, dtype):
        dense = field(1, data) + number(3, dtype) + number(4, len(targets))
        return field(2, field(1, name.encode()) + field(2, dense))

    chunk = field(1, field(1, struct.pack(f"<{len(inputs)}i", *inputs)))
    datum = field(1, chunk) + tensor("target_tokens", struct.pack(f"<{len(targets)}q", *targets), 2) \
        + tensor("weights", struct.pack(f"<{len(targets)}f", *[1.0] * len(targets)), 1)
    return field(1, model.encode()) + number(2, seq) + field(3, datum) + field(4, b"cross_entropy")
