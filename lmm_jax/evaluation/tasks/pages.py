"""Single questions about pages in unseen print."""

from lmm_jax.evaluation.tasks import turns

FILES = "a folder that `lmm prepare --dataset pages` wrote"
SPLIT = "test"
MAX_NEW_TOKENS = 18  # 16 digits are 17

METRIC = turns.METRIC

examples, check, score = turns.examples, turns.check, turns.score
