-- Metadata of one data folder. `seq` is the order of creation: lists page by it, because created_at has ties.
-- Forward only: later changes are later files.

CREATE TABLE files (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    bytes      INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    filename   TEXT    NOT NULL,
    purpose    TEXT    NOT NULL
) STRICT;

CREATE TABLE jobs (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT    NOT NULL UNIQUE,
    -- Digest of the base model the job trains on: it waits when another base is served.
    base             TEXT    NOT NULL,
    created_at       INTEGER NOT NULL,
    updated_at       INTEGER NOT NULL,
    finished_at      INTEGER,
    estimated_finish INTEGER,
    status           TEXT    NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    request          TEXT    NOT NULL,
    metadata         TEXT    NOT NULL,
    hyper            TEXT,
    -- The name the model will have; reserved from the start.
    model_name       TEXT    NOT NULL UNIQUE,
    fine_tuned_model TEXT,
    trained_tokens   INTEGER,
    result_files     TEXT    NOT NULL DEFAULT '[]',
    error            TEXT
) STRICT;
CREATE INDEX jobs_by_status ON jobs (status, seq);

CREATE TABLE job_events (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    job        TEXT    NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    level      TEXT    NOT NULL,
    message    TEXT    NOT NULL,
    data       TEXT    NOT NULL
) STRICT;
CREATE INDEX job_events_by_job ON job_events (job, seq);

CREATE TABLE checkpoints (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    job        TEXT    NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    step       INTEGER NOT NULL,
    model      TEXT    NOT NULL,
    metrics    TEXT    NOT NULL,
    UNIQUE (job, step)
) STRICT;

CREATE TABLE adapters (
    digest     TEXT    PRIMARY KEY,
    rank       INTEGER NOT NULL,
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- A name is an alias of an adapter, for the base it was made for.
CREATE TABLE names (
    base       TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    digest     TEXT    NOT NULL REFERENCES adapters (digest),
    source     TEXT    NOT NULL,
    job        TEXT,
    step       INTEGER,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (base, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX names_by_digest ON names (digest);
