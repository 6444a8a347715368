-- The SHA-256 of the bytes, made while they were written, in hexadecimal digits. NULL: they came before there were digests;
-- a file gets one when it is next read whole.
ALTER TABLE files ADD COLUMN sha256 TEXT;
ALTER TABLE upload_parts ADD COLUMN sha256 TEXT;
