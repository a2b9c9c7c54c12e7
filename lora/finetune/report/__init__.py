"""Writes a report of runs: one HTML page that opens from disk and needs no network."""
