"""Training: losses over edges, rows to token trees, the loop."""
