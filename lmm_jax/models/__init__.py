"""Pure Flax modules: what is encoded, how many visual tokens remain, and where they enter the decoder."""
