"""Where artifacts lie: on this disk, in an object store, and copied from it."""
