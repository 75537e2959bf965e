"""Threads of the process: who runs beside the engine, and on how many processors."""
