"""The search for the largest batch that fits."""

import pytest

from lmm_jax import sharding
from lmm_jax.aot import compile as tool
from lmm_jax.aot.fit import fit, fit_config
from lmm_jax.config import flatten


@pytest.mark.parametrize(
    ("base", "each", "want", "tries"),
    [
        ({"none": 5, "dots": 3, "full": 2}, {"none": 4, "dots": 2, "full": 1}, (14, "full"), 6),
        ({"none": 5, "dots": 3, "full": 2}, {"none": 0.5, "dots": 0.3, "full": 0.2}, (70, "full"), 6),
        ({"none": 2, "dots": 2, "full": 2}, {"none": 1, "dots": 1, "full": 1}, (14, "none"), 5),
        (
            {"none": 90, "dots": 80, "full": 20, "offload": 14},
            dict.fromkeys(("full", "offload"), 1),
            (2, "offload"),
            4,
        ),
        ({"full": 40, "offload": 30}, {"full": 1, "offload": 1}, (0, "offload"), 2),
    ],
)
def test_fit_finds_the_largest_batch_in_few_tries(base, each, want, tries):
    lines = []

    def compile(packs, policy):
        peak = base[policy] + each[policy] * packs
        return {"fits": peak <= 16, "peak_hbm_bytes": peak, "hbm_bytes": 16}

    packs, policy, result = fit(compile, lines.append)
    assert (packs, policy) == want and len(lines) <= tries
    assert result["fits"] == (packs > 0)
    assert lines[0].startswith("1 packs a device, remat full: ")


def test_fit_changes_batch_and_policy_alone(tiny, monkeypatch):
    config, tried = tiny("mesh.data=4", "mesh.tensor=2", "train.micro_batches=2"), []

    def compile(config, topology):
        tried.append(config)
        peak = config.train.batch_size // (4 * 2) + {"none": 9, "dots": 1, "full": 0}[config.model.decoder.remat]
        return {"fits": peak <= 6, "peak_hbm_bytes": peak, "hbm_bytes": 6}

    monkeypatch.setattr(tool, "compile", compile)
    monkeypatch.setattr(tool, "slice_mesh", lambda config, target: sharding.make_mesh(config.mesh))
    found = fit_config(config, "v5e-8", progress=lambda line: None)
    assert (found["packs"], found["batch_size"], found["remat"]) == (6, 48, "full")
    assert {c.train.micro_batches for c in tried} == {2} and config.train.batch_size == 8
    changed = ("train.batch_size", "model.decoder.remat")
    for other in tried:
        flat = flatten(other)
        assert all(flat[name] == value for name, value in flatten(config).items() if name not in changed)
