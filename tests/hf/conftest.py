"""The library that exports are compared with, where it is installed."""

import pytest


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """transformers, with a folder of ours for the code that it copies and runs."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'lmm_jax[hf]'")
    import torch
    import transformers
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of many that wait for one another
        yield transformers
        torch.set_num_threads(threads)
