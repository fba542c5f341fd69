"""TorchTitan 0.2. Read `trainer` first: it builds a Trainer of a TrainSpec that reads Mosaic streams.

`load` reads the job config. `job` checks it before the start, and makes a `Job` of it. `models` finds the text models
and gives them masks and positions, and `validator` is the validator.
"""
