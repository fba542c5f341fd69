"""TorchTitan 0.2. Read `spec` first: it makes the TrainSpecs that read Mosaic streams.

`load` reads the job config, `trainer` builds a Trainer of it. `checks` checks it before the start, and `job` makes a
`Job` of it. `models` finds the text models, `documents` gives the model's masks and positions, and `validator` is the
validator.
"""
