"""Examples on disk, packed into rows and loaded as batches."""
