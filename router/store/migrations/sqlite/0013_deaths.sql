-- How often in a row whoever worked on it went without a word, and it was no further than ever before.
ALTER TABLE jobs ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
-- The most trained tokens of all its lives.
ALTER TABLE jobs ADD COLUMN most_trained INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
-- The line that is asked, where lines are asked one by one.
ALTER TABLE batches ADD COLUMN at_line INTEGER;
