-- What a key may train in a day (UTC), and what it trained. NULL: as much as it likes.
ALTER TABLE keys ADD COLUMN training_tokens_per_day INTEGER;
-- The key that made a job, where its training is limited.
ALTER TABLE jobs ADD COLUMN key_id TEXT;
CREATE TABLE training_days (
    key_id TEXT NOT NULL,
    -- Days since 1970.
    day INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (key_id, day)
);
