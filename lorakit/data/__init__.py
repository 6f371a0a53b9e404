"""Floor 1: from folders of pictures to the batches of every step.

sources ──► buckets ──► plan ──► loader ◄── cache (latents, text states)
`dataset.prepare` ties the first three together, and `report` says what was found.
"""
