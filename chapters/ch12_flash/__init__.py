"""Chapter 12: attention without the matrix of scores: FlashAttention, split-K decoding, paged attention."""
