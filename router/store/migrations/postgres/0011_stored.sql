-- As sqlite/0011_stored.sql says.
ALTER TABLE keys ADD COLUMN stored_bytes BIGINT;
ALTER TABLE batches ADD COLUMN key_id TEXT;
ALTER TABLE batches ADD COLUMN answer_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN data_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE adapters ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0;
CREATE INDEX files_by_tenant ON files (tenant);
CREATE INDEX names_by_tenant ON names (tenant);

CREATE TABLE saves (
    run        TEXT   NOT NULL,
    kind       TEXT   NOT NULL,
    name       TEXT   NOT NULL,
    tenant     TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    bytes      BIGINT NOT NULL,
    record     TEXT   NOT NULL,
    PRIMARY KEY (run, kind, name)
);
CREATE INDEX saves_by_tenant ON saves (tenant, created_at);
CREATE INDEX saves_by_end ON saves (expires_at);
