"""Which samples are read, in which order, by which rank."""
