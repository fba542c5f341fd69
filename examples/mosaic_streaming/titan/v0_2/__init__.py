"""TorchTitan 0.2. Read `spec` first: it makes the TrainSpecs that read Mosaic streams.

`job_config` reads the job config, and `job` makes a `Job` of it. `checks`, `job_values` and `checkpoints` check it
before the start, and `refusals` explains what TorchTitan itself refuses. `documents` gives the model's masks and
positions, and `validator` is the validator.
"""
