"""What ranks tell each other: that they are ready, that they agree, and why one stops."""
