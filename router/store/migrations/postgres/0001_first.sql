-- As sqlite/0001_first.sql says, in the other dialect: the same tables, columns and types.

CREATE TABLE files (
    seq        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         TEXT    NOT NULL UNIQUE,
    bytes      BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    filename   TEXT    NOT NULL,
    purpose    TEXT    NOT NULL
);

CREATE TABLE jobs (
    seq              BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id               TEXT    NOT NULL UNIQUE,
    base             TEXT    NOT NULL,
    created_at       BIGINT NOT NULL,
    updated_at       BIGINT NOT NULL,
    finished_at      BIGINT,
    estimated_finish BIGINT,
    status           TEXT    NOT NULL,
    cancel_requested BIGINT NOT NULL DEFAULT 0,
    request          TEXT    NOT NULL,
    metadata         TEXT    NOT NULL,
    hyper            TEXT,
    model_name       TEXT    NOT NULL UNIQUE,
    fine_tuned_model TEXT,
    trained_tokens   BIGINT,
    result_files     TEXT    NOT NULL DEFAULT '[]',
    error            TEXT
);
CREATE INDEX jobs_by_status ON jobs (status, seq);

CREATE TABLE job_events (
    seq        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         TEXT    NOT NULL UNIQUE,
    job        TEXT    NOT NULL REFERENCES jobs (id),
    created_at BIGINT NOT NULL,
    level      TEXT    NOT NULL,
    message    TEXT    NOT NULL,
    data       TEXT    NOT NULL
);
CREATE INDEX job_events_by_job ON job_events (job, seq);

CREATE TABLE checkpoints (
    seq        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         TEXT    NOT NULL UNIQUE,
    job        TEXT    NOT NULL REFERENCES jobs (id),
    created_at BIGINT NOT NULL,
    step       BIGINT NOT NULL,
    model      TEXT    NOT NULL,
    metrics    TEXT    NOT NULL,
    UNIQUE (job, step)
);

CREATE TABLE adapters (
    digest     TEXT    PRIMARY KEY,
    rank       BIGINT NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE names (
    base       TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    digest     TEXT    NOT NULL REFERENCES adapters (digest),
    source     TEXT    NOT NULL,
    job        TEXT,
    step       BIGINT,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (base, name)
);
CREATE INDEX names_by_digest ON names (digest);
