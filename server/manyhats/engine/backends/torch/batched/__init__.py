"""All rows of a step at once, on a GPU or, for tests, on the CPU: ``Pending.result`` alone waits for the device."""
