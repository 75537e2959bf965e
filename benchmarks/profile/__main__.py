"""``python -m benchmarks.profile``."""

# Worker processes import this module again; what it imports would be loaded into each of them.
if __name__ == "__main__":
    from benchmarks.profile.run import main

    raise SystemExit(main())
