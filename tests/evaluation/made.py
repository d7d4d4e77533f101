"""Answers that tests make up."""

from lmm_jax.evaluation.records import Record


def record(number, score, scale=1, kind="cell", **other):
    """One answer; the true one is "yes"."""
    answer = "yes" if score == 1 else "no"
    fields = {"id": str(number), "question": f"question {number}?", "truths": ("yes",), "answer": answer}
    fields |= {"logprobs": (-0.1,), "end": -0.05, "reason": "end", "visual_tokens": scale, "seconds": 0.1}
    return Record(number=number, kind=kind, score=score, scale=scale, **fields | other)


def runs(scores, scales=(1, 4, 9, 36), kinds=None, **other):
    """Runs of scores `[S, n]`, the questions' kinds `[n]`."""
    return {
        str(scale): [
            record(n, score, scale, kinds[n] if kinds is not None else "cell", **other) for n, score in enumerate(of)
        ]
        for scale, of in zip(scales, scores, strict=True)
    }
