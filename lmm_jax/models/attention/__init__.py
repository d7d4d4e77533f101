"""Attention over segments, in the form that is fastest where it runs."""
