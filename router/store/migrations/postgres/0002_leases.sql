-- As sqlite/0002_leases.sql says.

ALTER TABLE jobs ADD COLUMN lease_owner TEXT;
ALTER TABLE jobs ADD COLUMN lease_until BIGINT;
ALTER TABLE jobs ADD COLUMN lease_epoch BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN state_epoch BIGINT;
ALTER TABLE jobs ADD COLUMN state_step BIGINT;

CREATE TABLE changes (
    kind TEXT   PRIMARY KEY,
    n    BIGINT NOT NULL
);
INSERT INTO changes (kind, n) VALUES ('jobs', 0), ('names', 0);
