"""Chapter 5: measuring, or which of two kernels is faster and why."""
