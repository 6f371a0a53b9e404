"""Floor 0: what every other package may use. Errors, settings, the registry, seeded randomness, files, processes."""
