"""Where artifacts are kept: on this disk, or in an object store with local copies."""
