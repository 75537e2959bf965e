"""``python -m benchmarks.peers``."""

# Worker processes import this module again; what it imports would be loaded into each of them.
if __name__ == "__main__":
    from benchmarks.peers.run import main

    raise SystemExit(main())
