"""The forward as ``model.forward`` states it, on any device that torch knows; on the CPU the oracle of the kernels."""
