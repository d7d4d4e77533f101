"""Compiling ahead of time, for TPU slices that are not there: memory, traffic, and the least time of a step."""
