"""Several hosts as one run: who is here, who is missing, and what the end of one means for the others."""
