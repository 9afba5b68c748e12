"""Exchange of checkpoints with other formats."""
