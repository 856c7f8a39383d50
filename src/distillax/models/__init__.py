"""The decoder: configuration, parameter table, forward pass, generation. Knows nothing of files."""
