"""Imported by the server that the trainings fork from, so that each of them starts at once."""

from tests.checkpoints.recipe import warm_up

warm_up()
