"""Patches of other projects' code, one file each.

Each file says which version it is for, why it is needed, and what makes it needless. `patch.replaced` checks name and
signature of what it replaces. `tests/upstream/` has a tripwire for each file.
"""
