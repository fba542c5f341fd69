"""Patches of other projects' code.

Each file has one patch and names the version, the reason, and what makes it needless. `tests/upstream/` has a test for
each that fails when what it relies on changes. `patch` is the one way in which attributes are replaced.
"""
