"""How fast the parts run here, beside ceilings and a PyTorch peer of the same run."""
