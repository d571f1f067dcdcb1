"""Chapter 7: reductions, from a tree in shared memory to warp shuffles."""
