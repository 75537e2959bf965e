"""The parts of ``record_outputs``, one module for each kind of output, and what they share."""
