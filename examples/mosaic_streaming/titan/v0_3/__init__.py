"""TorchTitan 0.3. Read `trainer` first: `mosaic` makes a config whose Trainer reads Mosaic streams.

`load` reads a job's file, or calls the user's function, and parses TorchTitan's flags. `translate` turns a file, which
has the keys of TorchTitan 0.2, into a config. `job` checks a config and makes a `Job` of it. `validator` has the
validator, and the configs of the two loaders.
"""
