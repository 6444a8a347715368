-- As sqlite/0004_tenants.sql says.

ALTER TABLE files ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
ALTER TABLE jobs ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
ALTER TABLE names ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';

CREATE TABLE keys (
    id         TEXT   PRIMARY KEY,
    hash       TEXT   NOT NULL UNIQUE,
    name       TEXT   NOT NULL,
    tenant     TEXT   NOT NULL,
    role       TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT
);
INSERT INTO changes (kind, n) VALUES ('keys', 0);
