"""Chapter 13: what a language model needs besides matrices: activations, positions, the cache, the next token."""
