"""Device code, and how it is started; `ops` checks and allocates."""
