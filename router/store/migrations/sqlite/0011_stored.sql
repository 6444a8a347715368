-- What a key lets its tenant store, in bytes (storage.rs). NULL: as much as it likes.
ALTER TABLE keys ADD COLUMN stored_bytes INTEGER;
-- The key that made a batch, where what it stores is limited.
ALTER TABLE batches ADD COLUMN key_id TEXT;
-- Of the answers that are rows until the batch ends.
ALTER TABLE batches ADD COLUMN answer_bytes INTEGER NOT NULL DEFAULT 0;
-- Of a job's datasets, which it has until it ends.
ALTER TABLE jobs ADD COLUMN data_bytes INTEGER NOT NULL DEFAULT 0;
-- 0: of an older version, and not looked at since.
ALTER TABLE adapters ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
CREATE INDEX files_by_tenant ON files (tenant);
CREATE INDEX names_by_tenant ON names (tenant);

-- What clients that train call by call have saved (saves.rs).
CREATE TABLE saves (
    run        TEXT    NOT NULL,
    kind       TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    tenant     TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    -- Of its file; 0 without one.
    bytes      INTEGER NOT NULL,
    -- JSON, all of it.
    record     TEXT    NOT NULL,
    PRIMARY KEY (run, kind, name)
) STRICT;
CREATE INDEX saves_by_tenant ON saves (tenant, created_at);
CREATE INDEX saves_by_end ON saves (expires_at);
