-- As sqlite/0012_kept.sql says.
ALTER TABLE jobs ADD COLUMN kept_bytes BIGINT NOT NULL DEFAULT 0;
