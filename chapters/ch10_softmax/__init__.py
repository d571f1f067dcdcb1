"""Chapter 10: softmax, a reduction that can overflow."""
