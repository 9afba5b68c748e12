"""From raw documents to examples on disk, on all cores."""
