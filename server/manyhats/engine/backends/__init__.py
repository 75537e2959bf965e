"""What computes: the seam to a device, and the devices behind it."""
