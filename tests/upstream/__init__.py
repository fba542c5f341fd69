"""What patches of other projects' code rely on."""
