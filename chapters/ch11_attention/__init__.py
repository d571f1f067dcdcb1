"""Chapter 11: causal attention in three kernels."""
