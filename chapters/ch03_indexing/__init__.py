"""Chapter 3: which thread works on which element."""
