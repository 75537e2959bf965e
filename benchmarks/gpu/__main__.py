"""``python -m benchmarks.gpu``."""

# Each part's process imports this module again; what it imports would be loaded into each of them.
if __name__ == "__main__":
    from benchmarks.gpu.run import main

    raise SystemExit(main())
