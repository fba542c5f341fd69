"""TorchTitan's trainer, unchanged, on MosaicML Streaming data through llm-foundry's loaders.

Begin with README.md in this folder, then `train.py`.
"""
