-- Batches of requests (batches.rs): what was asked, how far it is, and who works on it (as 0002_leases.sql says of jobs).
CREATE TABLE batches (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT    NOT NULL UNIQUE,
    tenant           TEXT    NOT NULL,
    -- Digest of the base model that answers: a batch waits when another base is served, until it expires.
    base             TEXT    NOT NULL,
    created_at       INTEGER NOT NULL,
    expires_at       INTEGER NOT NULL,
    -- JSON of who asked.
    request          TEXT    NOT NULL,
    status           TEXT    NOT NULL,
    in_progress_at   INTEGER,
    finalizing_at    INTEGER,
    cancelling_at    INTEGER,
    finished_at      INTEGER,
    -- Requests: all, those with an answer, those with an error.
    total            INTEGER NOT NULL DEFAULT 0,
    completed        INTEGER NOT NULL DEFAULT 0,
    failed           INTEGER NOT NULL DEFAULT 0,
    -- JSON, of a batch whose file was refused.
    errors           TEXT,
    output_file      TEXT,
    error_file       TEXT,
    lease_owner      TEXT,
    lease_until      INTEGER,
    lease_epoch      INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX batches_by_end ON batches (finished_at, seq);

-- Answers until the batch ends and they are files: one row for each line of the input that has one.
CREATE TABLE batch_lines (
    batch  TEXT    NOT NULL REFERENCES batches (id),
    line   INTEGER NOT NULL,
    ok     INTEGER NOT NULL,
    answer TEXT    NOT NULL,
    PRIMARY KEY (batch, line)
) STRICT, WITHOUT ROWID;

-- Files that come in parts (uploads.rs). A part's bytes lie where files lie, under the id in `file`.
CREATE TABLE uploads (
    id              TEXT    PRIMARY KEY,
    tenant          TEXT    NOT NULL,
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER NOT NULL,
    status          TEXT    NOT NULL,
    filename        TEXT    NOT NULL,
    purpose         TEXT    NOT NULL,
    bytes           INTEGER NOT NULL,
    -- Of the file that it becomes, in seconds.
    expires_after_s INTEGER,
    file            TEXT
) STRICT, WITHOUT ROWID;

CREATE TABLE upload_parts (
    id         TEXT    PRIMARY KEY,
    upload     TEXT    NOT NULL REFERENCES uploads (id),
    file       TEXT    NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    bytes      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX upload_parts_by_upload ON upload_parts (upload);
