"""Chapter 8: atomics, scans, and what they make together: histograms, compaction, radix select, top-k."""
