"""Device code only; `ops` checks, allocates and launches."""
