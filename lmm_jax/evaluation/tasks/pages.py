"""Single questions about pages in unseen print."""

from lmm_jax.evaluation.tasks import turns

MAX_NEW_TOKENS = 50  # 48 digits are 49

examples, score = turns.examples, turns.score
