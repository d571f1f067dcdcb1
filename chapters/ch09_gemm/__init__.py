"""Chapter 9: matrix products, from registers and 16-byte loads to tensor cores."""
