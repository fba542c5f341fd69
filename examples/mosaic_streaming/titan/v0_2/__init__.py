"""TorchTitan 0.2: TrainSpecs that read Mosaic streams, and its job config."""
