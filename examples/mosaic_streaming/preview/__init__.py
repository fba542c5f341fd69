"""A second program on the same parts: it looks at the data of a job without running it, and nothing imports it.

`__main__` reads the flags, `open` opens the streams as `JobData`, and `commands` has a function for each command. Each
makes a report (with `rows`, `plan` and `warnings`, `ledger`, `checkpoint`), which `tables` prints and `plots` draws.
"""
