"""Patches of other projects' code, one file each: version, reason, and what makes it needless."""
