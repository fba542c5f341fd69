"""Ranks, streams, stores and jobs for tests."""
