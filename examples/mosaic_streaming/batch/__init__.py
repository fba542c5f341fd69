"""An llm-foundry batch becomes one of TorchTitan: collate, shift, mask, documents, packing, checks."""
