"""Floor 3: what tells how good a result is. `judge` looks at pictures of the embedded base's world."""
