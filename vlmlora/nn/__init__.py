"""Building blocks that every model family shares: linear layers, norms, rotary positions, attention."""
