"""TorchTitan's trainer, unchanged, on MosaicML Streaming data through llm-foundry's loaders."""
