-- Responses that clients may name later (responses.rs). `bytes` is what its two texts have, and stands before them so that it
-- is read without them.
CREATE TABLE responses (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    tenant     TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    bytes      INTEGER NOT NULL,
    previous   TEXT,
    input      TEXT    NOT NULL,
    response   TEXT    NOT NULL
) STRICT;
CREATE INDEX responses_by_tenant ON responses (tenant, seq, bytes);
CREATE INDEX responses_by_age ON responses (created_at);
