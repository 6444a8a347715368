-- As sqlite/0010_digests.sql says.

ALTER TABLE files ADD COLUMN sha256 TEXT;
ALTER TABLE upload_parts ADD COLUMN sha256 TEXT;
