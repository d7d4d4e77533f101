"""Single questions about pages in unseen print."""

from lmm_jax.evaluation.tasks import turns

MAX_NEW_TOKENS = 16  # a row of twelve digits is 13

examples, score = turns.examples, turns.score
