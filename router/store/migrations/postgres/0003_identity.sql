-- As sqlite/0003_identity.sql says.

CREATE TABLE store (
    id    TEXT   NOT NULL,
    opens BIGINT NOT NULL
);

CREATE TABLE loose_files (
    id         TEXT   PRIMARY KEY,
    created_at BIGINT NOT NULL
);
