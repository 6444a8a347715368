-- Whose a thing is. What was there before there were tenants, and what is made without keys, is the default tenant's.
ALTER TABLE files ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
ALTER TABLE jobs ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
ALTER TABLE names ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';

-- API keys. Of the key itself only its SHA-256 is kept: it is 256 random bits, which nobody finds by trying, so a hash
-- that is slow on purpose (as for passwords) would only slow down the server.
CREATE TABLE keys (
    id         TEXT    PRIMARY KEY,
    hash       TEXT    NOT NULL UNIQUE,
    name       TEXT    NOT NULL,
    tenant     TEXT    NOT NULL,
    role       TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER
) STRICT, WITHOUT ROWID;
INSERT INTO changes (kind, n) VALUES ('keys', 0);
