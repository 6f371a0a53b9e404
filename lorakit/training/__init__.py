"""Floor 4: where everything meets: the step, the loop, checkpoints and the run's folder."""
