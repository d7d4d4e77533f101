"""The command line: verbs, JSON, refusals, tables and the page of a batch."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from lmm_jax import cli, evaluation, interrupts, verbs
from lmm_jax.data.prepared import Prepared
from lmm_jax.evaluation import summary
from lmm_jax.generation import model
from lmm_jax.tools import plots
from lmm_jax.training import loop

TRAIN = ("train", "--workdir", "w", "--config")
DATASET = ("prepare", "--dataset", "digits", "--out", "x")
GENERATE = ("generate", "--workdir", "w", "--prompt", "x")
COMPARE = ["evaluate", "--compare", "a.jsonl", "b.jsonl"]
PROMPTS = ("generate", "--workdir", "w", "--prompts")
WRONG_COUNTS = ("abc", "0", "-1", "2.5", "")
DIGITS = str(pathlib.Path(__file__).parents[1] / "configs/digits.py")


def run(capsys, *args):
    code = cli.main(list(map(str, args)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prepare_answers_with_counts(capsys, digits_folder):
    code, out, _ = run(capsys, "prepare", "--dataset", "digits", "--out", digits_folder, "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert (found["rows"], found["images"], found["refused"], found["pictures"]) == (112, 112, {}, {"1": 112})


def test_a_terminal_that_cannot_show_a_character_gets_it_spelled_out(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "--help"])
    sys.stdout.flush()
    assert ended.value.code == 0 and rb"3\xd73 mosaics" in out.getvalue()


def test_prepare_takes_rows_and_names_what_it_refused(capsys, tmp_path):
    rows = [{"id": str(n), "messages": [{"role": "user", "content": "hi"}] * n} for n in range(1, 4)]
    rows[1]["messages"] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    args = ["prepare", "--data", tmp_path / "rows.json", "--out", tmp_path / "out", "--workers", 0]
    code, out, err = run(capsys, *args, "--template", "chatml_direct", "--max-refused", 0.7, "--json")
    assert code == 0, err
    assert "1 nothing supervised" in out and "1 roles out of turn" in out and "refused.jsonl" in out
    assert "Downloading" not in out + err and "TensorFlow" not in out + err
    found = json.loads(out.splitlines()[-1])
    assert found["rows"] == 1 and found["refused"] == {"nothing supervised": 1, "roles out of turn": 1}
    data = Prepared(tmp_path / "out", "train")
    assert data.about["template"] == "chatml_direct" and data[0]["id"] == b"2"
    code, out, err = run(capsys, *args)
    assert code == 2 and "template was chatml_direct, is vicuna_v1" in err


def test_prepare_keeps_rows_to_validate_and_test_with(capsys, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": str(n), "messages": turns} for n in range(40)]))
    args = ["prepare", "--data", tmp_path / "rows.json", "--workers", 0, "--out", tmp_path / "out"]
    code, out, err = run(capsys, *args, "--validation", 6, "--test", "0.1", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    rows = {split: about["rows"] for split, about in found["splits"].items()}
    assert list(rows) == ["train", "validation", "test"] and rows["validation"] == 6 and sum(rows.values()) == 40
    assert f"  test: {rows['test']} rows, 0 images" in out
    code, _, err = run(capsys, *args, "--validation", 6, "--test", "0.1")
    assert code == 0 and "left as it is" in err


def test_train_evaluate_generate(capsys, tiny_args, tmp_path, digits_folder):
    workdir = tmp_path / "run"
    args = [*tiny_args, "--config.train.steps", "3", "--workdir", workdir]
    code, out, err = run(capsys, "train", *args, "--json")
    assert code == 0, err
    assert {"step", "loss", "tokens_per_second"} <= json.loads(out.splitlines()[-1]).keys()

    code, out, err = run(capsys, "evaluate", "--workdir", workdir, "--scales", "1,9", "--limit", "3", "--json")
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])
    assert list(results["digits"]) == ["1", "9"]
    assert json.loads((workdir / "evaluation.json").read_text()) == results
    for name in ("accuracy_vs_tokens.png", "answers.png", "loss.png"):
        assert (workdir / name).read_bytes()[1:4] == b"PNG"

    picture = tmp_path / "picture.png"
    picture.write_bytes(Prepared(digits_folder, "test")[0]["images"][0])
    args = ["generate", "--workdir", workdir, "--image", picture, "--prompt", "read all", "--max-new-tokens", 4]
    code, out, err = run(capsys, *args, "--scale", 4, "--json")
    assert code == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert answer["visual_tokens"] == 4 and answer["seconds"] > 0 and isinstance(answer["text"], str)

    out_folder = tmp_path / "exported"
    code, out, err = run(capsys, "export", "--workdir", workdir, "--out", out_folder, "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert {"model.safetensors", "config.json", "README.md"} <= set(found["files"])
    assert found["max_logit_difference"] is None
    card = (out_folder / "README.md").read_text()
    assert "| 9 |" in card and "the questions of the task `digits`" in card  # the evaluation's table, and its task
    code, _, err = run(capsys, "evaluate", "--model", out_folder)
    assert (
        code == 2 and "task 'digits' reads a folder that `lmm prepare --dataset digits` wrote, and the model" in err
    )
    code, out, _ = run(capsys, "show", "params", "--model", out_folder)
    assert code == 0 and "post_layernorm" in out and "follows the last block" in out


def test_show_prints_tables_and_a_page(capsys, tiny_args, tmp_path):
    code, out, _ = run(capsys, "show", "params", *tiny_args)
    assert code == 0 and "decoder/layers/up/kernel" in out and "layers,embed,mlp" in out and "projector" in out
    code, out, _ = run(capsys, "show", "sharding", *tiny_args, "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    assert code == 0 and "(None, 'fsdp', 'tensor')" in out
    page = tmp_path / "batch.html"
    code, out, _ = run(capsys, "show", "batch", *tiny_args, "--packs", 2, "--out", page, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1]) == {"path": str(page)}
    text = page.read_text()
    assert text.count('class="pack"') == 2 and "data:image/png" in text
    assert "<!doctype html>" in text and "positions of padding" in text  # see tools/test_batch_page.py


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["train", "--config", "configs/digits.py", "--config.train.stepz=3", "--workdir", "w"],
            "did you mean 'train.steps'",
        ),
        (
            ["train", "--config", "configs/digits.py", "--config.train.steps=x", "--workdir", "w"],
            "train.steps is int",
        ),
        ([*TRAIN, "nowhere.py"], "no config file nowhere.py"),
        ([*TRAIN, f"{DIGITS}:data=nowhere"], "run `lmm prepare`"),
        (["evaluate", "--workdir", "nowhere"], "neither a workdir of `lmm train`"),
        (["evaluate", "--workdir", "nowhere", "--scales", "9,x"], "--scales: expected whole numbers"),
        (["evaluate", "--workdir", "w", "--reduction", "zip"], "name a folder for them by --out DIR"),
        (
            ["evaluate", "--workdir", "w", "--reduction", "zip", "--out", "x", "--scales", "auto"],
            "--scales auto is for the model as it was trained",
        ),
        (["evaluate", "--scales", "9"], "name a model by --workdir DIR or by --model DIR"),
        ([*COMPARE, "--workdir", "w"], "--workdir does not go with --compare, which asks no model"),
        ([*COMPARE, "--tasks", "digits"], "--tasks does not go with --compare"),
        ([*COMPARE, "--describe"], "--describe does not go with --compare"),
        ([*COMPARE, "--scales", "9"], "--scales does not go with --compare"),
        ([*COMPARE, "--fit-auto"], "--fit-auto does not go with --compare"),
        (COMPARE, "no result file a.jsonl"),
        (["evaluate", "--describe", "--oracle"], "--oracle does not go with --describe"),
        (["evaluate", "--describe", "--tasks", "digits,x"], "task 'x' does not exist; choose from digits"),
        (["evaluate", "--workdir", "w", "--fit-auto", "--scales", "1,9,auto"], "--fit-auto asks at fixed budgets"),
        (["evaluate", "--workdir", DIGITS, "--fit-auto"], f"--fit-auto writes auto.json to {DIGITS}: "),
        (["evaluate", "--workdir", "w", "--out", DIGITS], f"--out {DIGITS}: "),
        (
            ["generate", "--workdir", "w", "--prompt", "x", "--image", "nothere.png"],
            "--image[0]: no file nothere.png",
        ),
        (["generate", "--workdir", "w", "--prompt", "x", "--image", DIGITS], "--image: cannot read a picture from"),
        ([*GENERATE, "--temperature", "-1"], "temperature=-1.0 (a float): a number from 0"),
        ([*GENERATE, "--top-p", "0"], "top_p=0.0 (a float): a number above 0"),
        ([*GENERATE, "--stop", ""], "stop[0] is an empty text"),
        ([*GENERATE, "--out", "x.jsonl"], "--out goes with --prompts, or with a folder of pictures"),
        ([*GENERATE, "--skip-bad"], "--skip-bad goes with --prompts"),
        ([*GENERATE, "--images", "tests"], "--images goes with --prompts"),
        ([*GENERATE, "--image", "launch"], "no picture in the folder launch"),
        ([*GENERATE, "--image", "configs", DIGITS], f"configs is a folder and {DIGITS} is none"),
        ([*PROMPTS, "nowhere.jsonl"], "--prompts: no file nowhere.jsonl"),
        ([*PROMPTS, DIGITS], "digits.py, line 1: broken JSON"),
        ([*PROMPTS, DIGITS, "--image", "configs"], "configs is a folder, which goes with --prompt"),
        ([*PROMPTS, DIGITS, "--image", "x.png"], "name their own pictures"),
        ([*PROMPTS, DIGITS, "--skip-bad", "--out", "configs"], "--out configs is a folder"),
        (["chat", "--workdir", "w", "--top-k", "1", "--temperature", "nan"], "temperature=nan"),
        (["export", "--workdir", "w", "--out", "x"], "w is no workdir"),
        (["show", "params"], "needs one of --config, --workdir and --model"),
        (["prepare", "--data", "nowhere.json", "--out", "x"], "no file nowhere.json"),
        (["prepare", "--data", DIGITS, "--out", "x", "--images", "nowhere"], "no folder of pictures"),
        (["prepare", "--data", DIGITS, "--out", "x", "--template", "vicuna"], "no template 'vicuna'; known are"),
        (["prepare", "--data", DIGITS, "--out", "x", "--max-refused", "5"], "from 0 to 1"),
        (["prepare", "--data", DIGITS, "--out", "x", "--workers", "-1"], "-1 worker processes"),
        (["prepare", "--data", DIGITS, "--out", "x", "--rows", "5"], "--rows goes with --dataset, not with --data"),
        (
            ["prepare", "--data", DIGITS, "--out", "x", "--source", "s"],
            "--source goes with --dataset",
        ),
        (
            ["prepare", "--data", DIGITS, "--out", "x", "--validation", "-3"],
            "--validation -3: expected a number of rows",
        ),
        (["prepare", "--data", DIGITS, "--out", "x", "--test", "1.5"], "--test 1.5: expected a number of rows"),
        (["prepare", "--data", DIGITS, "--out", "x", "--test", "abc"], "--test abc: expected a number of rows"),
        (
            ["prepare", "--data", DIGITS, "--out", "x", "--test-data", "nowhere.json"],
            "--test-data: no file nowhere.json",
        ),
        (
            ["prepare", "--data", DIGITS, "--out", "x", "--validation", "5", "--test-data", DIGITS],
            "--validation and --test-data: either numbers of the rows of --data, or a file for each split",
        ),
        ([*DATASET, "--validation", "5"], "--validation goes with --data"),
        ([*DATASET, "--test-data", "x"], "--test-data goes with --data"),
        ([*DATASET, "--rows", "0"], "--rows 0: expected the number of training rows, 1 or more"),
        ([*DATASET, "--source", "s"], "data set digits is bundled and takes no source, but was given s"),
        ([*DATASET, "--images", "x"], "--images goes with --data"),
        ([*DATASET, "--tokenizer", "x"], "--tokenizer goes with --data"),
        ([*DATASET, "--template", "x"], "--template goes with --data"),
        ([*DATASET, "--workers", "0"], "--workers goes with --data"),
        ([*DATASET, "--max-refused", "0"], "--max-refused goes with --data"),
    ],
)
def test_refusals_are_one_sentence_and_code_2(capsys, args, message):
    code, _, err = run(capsys, *args)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "args",
    [
        ["trian"],
        ["train", "--confg", "x"],
        ["prepare", "--dataset", "mnist", "--out", "x"],
        ["prepare", "--out", "x"],
        [*DATASET, "--data", "x"],
        *([*GENERATE, flag, bad] for flag in ("--scale", "--max-new-tokens") for bad in WRONG_COUNTS),
        ["evaluate", "--workdir", "w", "--limit", "0"],
    ],
)
def test_usage_errors_exit_with_2(capsys, args):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2
    assert ("a whole number of 1 or more is valid" in capsys.readouterr().err) == (args[-1] in WRONG_COUNTS)


def test_results_are_printed_although_they_cannot_be_saved(capsys, monkeypatch, tmp_path):
    """A folder stands in the place of the file; a plot that cannot be written says so, and ends nothing."""
    results = {"digits": {"9": {"read": 0.5, "n_read": 2}}}
    monkeypatch.setattr(model, "load", lambda *_, **__: types.SimpleNamespace(scales=(9,)))
    found = evaluation.Evaluation(results, {}, {}, [])
    monkeypatch.setattr(evaluation, "evaluate_tasks", lambda *_, **__: found)
    monkeypatch.setattr(summary, "write_summary", lambda *_: None)

    def fails(*_, **__):
        raise PermissionError(13, "Permission denied", "plot.png")

    monkeypatch.setattr(plots, "draw_accuracy", fails)
    monkeypatch.setattr(plots, "draw_answers", fails)
    args = ["evaluate", "--workdir", tmp_path, "--tasks", "digits", "--json"]
    (tmp_path / "evaluation.json").mkdir()
    code, out, err = run(capsys, *args)
    assert code == 2 and "0.500" in out and json.loads(out.splitlines()[-1]) == results
    assert "the results above are not saved: " in err and "name a folder for them by --out DIR" in err
    code, out, err = run(capsys, *args, "--out", tmp_path / "elsewhere")
    assert code == 0 and out.count("not drawn: [Errno 13]") == 2 and json.loads(out.splitlines()[-1]) == results
    assert json.loads((tmp_path / "elsewhere/evaluation.json").read_text()) == results


def test_data_of_evaluate_is_a_folder_or_one_for_each_task():
    assert verbs._folders(None) is None and verbs._folders("runs/digits_data") == "runs/digits_data"
    assert verbs._folders("digits=a/b,pages=gs://c/d=e") == {"digits": "a/b", "pages": "gs://c/d=e"}
    assert verbs._folders("./seed=1") == "./seed=1" and verbs._folders("runs/seed=1,x") == "runs/seed=1,x"


def test_help_of_evaluate_says_what_each_task_reads(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert "pages reads a folder that `lmm prepare --dataset pages` wrote" in " ".join(
        capsys.readouterr().out.split()
    )


def test_errors_that_are_not_ours_keep_their_traceback(capsys, tiny_args, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "train", lambda *_, **__: json.loads("broken"))
    code, _, err = run(capsys, "train", *tiny_args, "--workdir", tmp_path)
    assert code == 1 and "Traceback" in err


# What runs in a library that holds the main thread for minutes, and what takes a Ctrl-C and does nothing with it.
HELD = {
    "a library": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "a handler": "signal.signal(signal.SIGINT, lambda *_: None); time.sleep(600)",
}


@pytest.mark.parametrize("by", HELD)
def test_a_second_ctrl_c_quits_whatever_holds_the_command(by):
    code = (
        "import hashlib, signal, sys, time\nfrom lmm_jax import cli, verbs\n"
        f"def show(args):\n    print('held', flush=True); {HELD[by]}\n"
        "verbs.show = show\nsys.exit(cli.main(['show', 'config']))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A process cannot handle what it was started to ignore, as these tests are where they run in the background.
    command = ["env", "--default-signal=INT", sys.executable, "-c", code]
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    assert process.stdout.readline() == "held\n"
    for _ in range(2):
        time.sleep(0.3)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - begin < interrupts.GRACE + 3
    assert err.endswith("lmm: stopped by Ctrl-C\n") and "Traceback" not in err


def test_the_first_ctrl_c_ends_a_command_that_saves_nothing(capfd, monkeypatch):
    ended = []
    monkeypatch.setattr(verbs, "show", lambda args: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(verbs.show, "__name__", "show")
    monkeypatch.setattr("lmm_jax.pods.wire.end", lambda code: ended.append(code))
    before, handler = signal.set_wakeup_fd(-1), signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main(["show", "config"])
    signal.signal(signal.SIGINT, handler)
    assert ended == [130] and "stopped by Ctrl-C" in capfd.readouterr().err
    assert signal.set_wakeup_fd(before) == -1  # as it was


@pytest.mark.parametrize(
    "args",
    [
        ["train", "--config", DIGITS, "--workdir", ""],
        ["train", "--config", "", "--workdir", "w"],
        ["prepare", "--data", "", "--out", "x"],
        ["prepare", "--data", "x", "--out", ""],
        ["prepare", "--data", "x", "--out", "y", "--images", ""],
        ["export", "--workdir", "", "--out", "x"],
        ["export", "--workdir", "w", "--out", ""],
        ["generate", "--workdir", "", "--prompt", "x"],
        ["evaluate", "--workdir", "w", "--data", ""],
        ["show", "params", "--workdir", ""],
        ["show", "batch", "--config", DIGITS, "--out", ""],
        ["compile", "--config", DIGITS, "--topology", ""],
        ["bench", "train", "--shape", ""],
    ],
)
def test_an_empty_name_is_refused(capsys, args):
    """As `--workdir "$RUN"` gives it where RUN is not set: the current folder became a run."""
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    name = args[args.index("") - 1]
    assert (
        ended.value.code == 2 and f"{name} is empty; is a variable of the shell not set?" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "args",
    [
        ["train", "--config", DIGITS, "--workdir", "hdfs://a/b"],
        ["train", "--config", DIGITS, "--workdir", "w", "--config.data.path=https://a/b"],
        ["train", "--config", f"{DIGITS}:data=file://a/b", "--workdir", "w"],
        ["export", "--workdir", "w", "--out", "hf://a/b"],
    ],
)
def test_a_place_that_nothing_reads_is_refused(capsys, args):
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code == 2 and "nothing here reads" in capsys.readouterr().err


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = ["train", "--workdir=~/a", "--config", "own.py:data=~/b,model=~/c", "--config.init.from=~/d", "--x", "~/e"]
    assert cli._with_home(args)[1:5] == [
        "--workdir=/home/me/a",
        *args[2:3],
        "own.py:data=/home/me/b,model=/home/me/c",
        "--config.init.from=/home/me/d",
    ]
    for prompt in (["--prompt", "what is a=~/b?"], ["--prompt=~/b"], ["--system", "a=~/b"], ["--stop=~/"]):
        assert cli._with_home(prompt) == prompt


@pytest.mark.parametrize(("words", "printed"), [("Event loop is closed", False), ("another", True)])
def test_writers_of_a_save_that_failed_print_nothing_more(monkeypatch, words, printed):
    told = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    cli._print_unraisable(types.SimpleNamespace(exc_value=RuntimeError(words)))
    assert bool(told) == printed


NUMBERS = (["show", "batch", "--packs"], ["bench", "train", "--steps"], ["bench", "data", "--records"])
NUMBERS += (["bench", "data", "--photographs"], ["bench", "data", "--packs"])
NUMBERS += (["compile", "--config", DIGITS, "--topology", "v5e-4", "--step", "decode", "--prompts"],)


@pytest.mark.parametrize(
    "args",
    [
        *([*args, bad] for args in NUMBERS for bad in ("0", "-1", "x")),
        *(["bench", "data", "--step-seconds", bad] for bad in ("0", "-1", "nan", "inf", "x")),
        *([*TRAIN, DIGITS, "--profile", bad] for bad in ("-1", "x", "0.5")),
    ],
)
def test_numbers_out_of_range_are_refused_with_what_is_valid(capsys, args):
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and f"argument {args[-2]}: a " in err and f"is valid, not '{args[-1]}'" in err


def test_demo_without_gradio_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmm_jax.demo.page", None)  # as if its import of gradio had failed
    monkeypatch.delattr("lmm_jax.demo.page", raising=False)
    code, _, err = run(capsys, "demo", "--workdir", "w")
    assert code == 2 and err.startswith("lmm: error: lmm demo needs gradio")
    assert err.endswith("pip install 'lmm_jax[demo]'\n")


def test_demo_checks_its_address_before_it_loads(capsys, monkeypatch):
    calls = []
    page = types.SimpleNamespace(
        check_address=lambda *address: calls.append(address), serve=lambda *args: calls.append(args)
    )
    monkeypatch.setitem(sys.modules, "lmm_jax.demo.page", page)
    monkeypatch.setattr("lmm_jax.demo.page", page, raising=False)
    monkeypatch.setattr(model, "load", lambda folder, **_: calls.append(folder) or "the model")
    assert run(capsys, "demo", "--model", "m", "--port", 99, "--max-upload", 3)[0] == 0
    assert calls == [("127.0.0.1", 99), "m", ("the model", "m", "127.0.0.1", 99, 3)]
    for flag, value in (("--port", "0"), ("--port", "x"), ("--max-upload", "0"), ("--host", "")):
        with pytest.raises(SystemExit) as ended:
            run(capsys, "demo", "--model", "m", flag, value)
        assert ended.value.code == 2
