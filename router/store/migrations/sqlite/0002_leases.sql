-- Who works on a job: the holder of its lease. Times of leases are milliseconds of the database's clock.

-- The process that holds the job, until when, and how often the job has changed hands or been begun again.
ALTER TABLE jobs ADD COLUMN lease_owner TEXT;
ALTER TABLE jobs ADD COLUMN lease_until INTEGER;
ALTER TABLE jobs ADD COLUMN lease_epoch INTEGER NOT NULL DEFAULT 0;
-- The last state that was kept: of which life, after which optimizer step.
ALTER TABLE jobs ADD COLUMN state_epoch INTEGER;
ALTER TABLE jobs ADD COLUMN state_step INTEGER;

-- Counters that grow with every change of a kind: readers elsewhere look at them instead of at everything.
CREATE TABLE changes (
    kind TEXT    PRIMARY KEY,
    n    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO changes (kind, n) VALUES ('jobs', 0), ('names', 0);
