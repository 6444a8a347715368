-- A sweep is a job whose trials are jobs: each says whose it is, and the sweep what became of them (JSON of the caller's).
ALTER TABLE jobs ADD COLUMN parent TEXT;
ALTER TABLE jobs ADD COLUMN trials TEXT;
CREATE INDEX jobs_by_parent ON jobs (parent) WHERE parent IS NOT NULL;
