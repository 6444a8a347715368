-- As sqlite/0005_responses.sql says.

CREATE TABLE responses (
    seq        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         TEXT   NOT NULL UNIQUE,
    tenant     TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    bytes      BIGINT NOT NULL,
    previous   TEXT,
    input      TEXT   NOT NULL,
    response   TEXT   NOT NULL
);
CREATE INDEX responses_by_tenant ON responses (tenant, seq, bytes);
CREATE INDEX responses_by_age ON responses (created_at);
