"""From messages and images to batches of static shape: host side, numpy only."""
