"""Chapter 13: what a language model needs besides matrices: GELU, and choosing the next token."""
