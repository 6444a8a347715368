-- As sqlite/0007_sweeps.sql says.

ALTER TABLE jobs ADD COLUMN parent TEXT;
ALTER TABLE jobs ADD COLUMN trials TEXT;
CREATE INDEX jobs_by_parent ON jobs (parent) WHERE parent IS NOT NULL;
