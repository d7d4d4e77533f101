"""Single questions about unseen handwriting."""

from lmm_jax.evaluation.tasks import turns

FILES = "a folder that `lmm prepare --dataset digits` wrote"
SPLIT = "test"
MAX_NEW_TOKENS = 12  # nine digits are 10

METRIC = turns.METRIC

examples, check, score = turns.examples, turns.check, turns.score
