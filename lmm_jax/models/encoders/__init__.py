"""Vision encoders: pictures to grids of features."""
