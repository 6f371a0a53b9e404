"""Floor 4: where family, adapter, objective, optimizer and data meet: the step, the loop, checkpoints and the run folder."""
