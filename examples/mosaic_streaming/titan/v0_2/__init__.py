"""TorchTitan 0.2: `spec` registers TrainSpecs that read Mosaic streams, and `job` makes a `Job` of its job config."""
