"""What works around other projects' code: a file for each, entered by its name.

Each file names the version, the reason, and what makes it needless. `patch` is the one way in which attributes are
replaced. `tests/upstream/` has a test for each file, which fails when what it relies on changes.

TorchTitan: `cpu`, `expert_counts`, `log_line`, `train_specs`. streaming: `large_index`, `sample_order`,
`shared_memory`. llm-foundry: `lazy_imports`. torch and Python: `missing_keys`, `rendezvous`, `torchelastic`, `workers`.
"""
