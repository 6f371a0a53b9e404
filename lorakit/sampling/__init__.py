"""Floor 3: pictures from a ready pipeline."""
