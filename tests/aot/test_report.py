"""What `lmm compile` says to a reader."""

from lmm_jax.aot.report import report


def test_what_does_not_fit_is_said_in_words():
    words = report(
        {
            "topology": "v5e-16",
            "step": "train",
            "accelerator": "v5litepod-16",
            "devices": 16,
            "mesh": {"fsdp": 16},
            "fits": False,
            "peak_hbm_bytes": 20 * 2**30,
            "hbm_bytes": 15 * 2**30,
            "state_bytes": 6 * 2**30,
            "memory": {"optimizer": 4 * 2**30, "batch": 2**20, "temporaries": 16 * 2**30, "largest": []},
            "collectives": None,
            "savings": None,
            "compile_seconds": 3.0,
            "reason": "RESOURCE_EXHAUSTED",
        }
    )
    assert "does NOT fit: needs 20.00 GiB a device, 5.00 GiB more than the 15.00 GiB there are" in words
    assert "optimizer 4.00 GiB, batch 1.00 MiB, temporaries 16.00 GiB" in words
    assert "model.decoder.remat=full, then offload; more train.micro_batches" in words
