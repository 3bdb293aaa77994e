"""Side by side with the other implementations of Lion: ``python -m benchmarks``."""
