"""Chapter 4: how memory is read and written, and how a layout decides it."""
