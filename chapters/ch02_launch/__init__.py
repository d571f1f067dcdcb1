"""Chapter 2: launching a kernel."""
