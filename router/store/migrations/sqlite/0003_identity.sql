-- Which database this is: the place of its artifacts says the same (identity.rs). One row, made at the first start.
CREATE TABLE store (
    id    TEXT    NOT NULL,
    opens INTEGER NOT NULL
) STRICT;

-- Files whose bytes may be there though no row names them: on their way in, or out. What a kill leaves of them goes.
CREATE TABLE loose_files (
    id         TEXT    PRIMARY KEY,
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
