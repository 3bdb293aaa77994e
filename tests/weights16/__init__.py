"""16-bit weights that train: master bits and stochastic rounding, through the optimizers."""
