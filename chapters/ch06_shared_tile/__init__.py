"""Chapter 6: threads of a block share what they read."""
