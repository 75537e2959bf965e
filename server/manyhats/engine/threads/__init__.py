"""Threads of the process: what runs beside the engine, and on how many processors."""
