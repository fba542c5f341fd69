"""A second program on the same parts: a look at the data of a job without running it."""
