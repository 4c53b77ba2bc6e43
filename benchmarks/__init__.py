"""Throughput of the engine at the loop's work, each idea with its ablation: `python -m benchmarks`."""
