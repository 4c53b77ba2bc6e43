"""The self-rewarding loop: stages, judge, pairs, evaluation and report, on the engine's public API."""
