"""What `lmm bench` refuses, and what it needs to be installed."""

import os
import subprocess
import sys

import pytest

from lmm_jax import cli


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "lmm bench train needs --shape"),
        (["data"], "lmm bench data needs --config"),
        (["train", "--shape", "small", "--growth", "folder", "--peer"], "--growth goes with lmm bench train alone"),
        (["decode", "--shape", "small", "--growth", "folder"], "--growth goes with lmm bench train alone"),
        (["decode", "--shape", "nowhere"], "neither a file nor one of base, llava15_7b, llava_1b, small"),
    ],
)
def test_refusals(capsys, args, message):
    assert cli.main(["bench", *args]) == 2
    assert message in capsys.readouterr().err


def test_without_torch_the_extra_is_named(capsys, monkeypatch, shape_file):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["bench", "attention", "--shape", str(shape_file), "--peer"]) == 2
    assert "--peer needs torch: pip install 'lmm_jax[hf]'" in capsys.readouterr().err


def test_the_model_is_measured_without_packages_of_the_data_path(shape_file):
    code = (
        "import sys\n"
        "for name in ('grain', 'tensorflow_datasets', 'ml_collections', 'orbax', 'sentencepiece', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from lmm_jax import cli\n"
        "from lmm_jax.bench import decode, measure, train\n"
        "measure.MATMUL_SIDE = {'cpu': 32}\n"
        f"sys.exit(cli.main(['bench', 'attention', '--steps', '1', '--shape', {str(shape_file)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
