-- What a job that has not ended may store beside its datasets: its state, and an adapter (core `job::kept_bytes`).
ALTER TABLE jobs ADD COLUMN kept_bytes INTEGER NOT NULL DEFAULT 0;
