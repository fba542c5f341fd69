"""The seam to TorchTitan: a package for each generation of it."""
