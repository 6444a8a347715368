-- What a key may ask in a minute. NULL: as much as it likes.
ALTER TABLE keys ADD COLUMN requests_per_minute INTEGER;
ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER;
