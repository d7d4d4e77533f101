"""Data sets that `lmm prepare --dataset NAME` knows how to build."""
