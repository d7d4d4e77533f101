"""Pictures and conversations to packed batches: numpy only; nothing here imports jax."""
