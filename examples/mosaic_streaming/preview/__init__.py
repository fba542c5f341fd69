"""A second program on the same parts: it shows the data of a job without running it.

`__main__` parses the flags and opens a `JobData`. `commands` has a function for each command. It makes a report
(`rows`, `plan`, `ledger`, `checkpoint`, `warnings`), which is printed as tables (`tables`, `plan_tables`) or as JSON.
Nothing imports this room.
"""
