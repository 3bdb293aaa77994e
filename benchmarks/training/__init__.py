"""Trainings side by side: loss, memory and speed of a model with several optimizers, over rates and seeds."""
