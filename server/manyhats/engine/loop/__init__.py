"""The engine's loop: jobs, steps, and the thread that runs them."""
