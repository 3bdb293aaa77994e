"""All that is asked of a machine with a GPU: ``python -m benchmarks.gpu --out FOLDER``."""
