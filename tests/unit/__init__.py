"""Tests of one room or file at a time."""
