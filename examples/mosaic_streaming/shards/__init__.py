"""Indexes, fetching, caches and reading: only files that are right, and errors that reach the reader."""
