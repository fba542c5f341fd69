"""The command line, the files it names, and the loader configuration: read, filled in, refused, explained."""
