"""The saved position, the fingerprint of the data, and what has been read."""
