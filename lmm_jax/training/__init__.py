"""One trainer for every recipe: pure step, short loop, checkpoints that resume on any mesh."""
