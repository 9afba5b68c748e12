"""Training: loss, optimizer, step, loop, and one run folder from config to last checkpoint."""
