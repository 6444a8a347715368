-- As sqlite/0006_batches.sql says.

CREATE TABLE batches (
    seq              BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id               TEXT    NOT NULL UNIQUE,
    tenant           TEXT    NOT NULL,
    base             TEXT    NOT NULL,
    created_at       BIGINT NOT NULL,
    expires_at       BIGINT NOT NULL,
    request          TEXT    NOT NULL,
    status           TEXT    NOT NULL,
    in_progress_at   BIGINT,
    finalizing_at    BIGINT,
    cancelling_at    BIGINT,
    finished_at      BIGINT,
    total            BIGINT NOT NULL DEFAULT 0,
    completed        BIGINT NOT NULL DEFAULT 0,
    failed           BIGINT NOT NULL DEFAULT 0,
    errors           TEXT,
    output_file      TEXT,
    error_file       TEXT,
    lease_owner      TEXT,
    lease_until      BIGINT,
    lease_epoch      BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX batches_by_end ON batches (finished_at, seq);

CREATE TABLE batch_lines (
    batch  TEXT    NOT NULL REFERENCES batches (id),
    line   BIGINT NOT NULL,
    ok     BIGINT NOT NULL,
    answer TEXT    NOT NULL,
    PRIMARY KEY (batch, line)
);

CREATE TABLE uploads (
    id              TEXT    PRIMARY KEY,
    tenant          TEXT    NOT NULL,
    created_at      BIGINT NOT NULL,
    expires_at      BIGINT NOT NULL,
    status          TEXT    NOT NULL,
    filename        TEXT    NOT NULL,
    purpose         TEXT    NOT NULL,
    bytes           BIGINT NOT NULL,
    expires_after_s BIGINT,
    file            TEXT
);

CREATE TABLE upload_parts (
    id         TEXT    PRIMARY KEY,
    upload     TEXT    NOT NULL REFERENCES uploads (id),
    file       TEXT    NOT NULL UNIQUE,
    created_at BIGINT NOT NULL,
    bytes      BIGINT NOT NULL
);
CREATE INDEX upload_parts_by_upload ON upload_parts (upload);
