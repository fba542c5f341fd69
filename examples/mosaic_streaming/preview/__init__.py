"""A second program, built from the same modules: it looks at the data of a job without running it.

`__main__` reads the flags, `first_look` says at once what is opened, `open_data` opens the streams as `JobData`, and
`commands` has a function for each command. Each makes a report (with `rows`, `plan` and `warnings`, `ledger`,
`checkpoint`), which `tables` prints and `plots` draws. Nothing imports this room.
"""
