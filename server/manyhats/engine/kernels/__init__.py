"""The few operations the decoder is made of, behind one interface."""
