"""The `lmm` command. Heavy imports happen inside the verbs, so that `lmm --help` is instant."""

import argparse
import itertools
import logging
import os
import re
import sys
import traceback

from lmm_jax import errors, interrupts, strict_json, verbs
from lmm_jax.exit_codes import PREEMPTED, STOPPED

SCHEMES = ("gs", "s3")  # of buckets, as etils.epath opens them
TEXTS = ("prompt", "system", "stop")  # arguments that name no place

EPILOG = """\
a first run, from a clone:
  lmm prepare --dataset digits --out runs/digits_data
  lmm train --config configs/digits.py --workdir runs/digits
  lmm evaluate --workdir runs/digits
  lmm generate --workdir runs/digits --image runs/digits_data/example.png --prompt "read all" --scale 9

The same command again continues what was interrupted. `lmm VERB --help` explains a verb; README.md says where to
read on.

exit codes: 0 done, 2 wrong usage or refused input, 75 preempted after everything was saved, 124 something took longer
than it may, 130 stopped by Ctrl-C, 1 anything else; launch/README.md says what to do
"""


def main(argv=None) -> int:
    """Runs one verb; returns the exit code."""
    alone = argv is None  # the process is this command's alone
    if alone:
        sys.unraisablehook = _print_unraisable
    argv = _with_home(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal cannot show is spelled out, as it is on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser(
        datasets=_datasets() if "prepare" in argv else {},
        tasks=_tasks() if "evaluate" in argv else {},
    )
    args, rest = parser.parse_known_args(argv)
    if "config" in args:
        args.overrides, rest = _take_overrides(rest)
        if args.overrides and not args.config:
            parser.error("--config.FIELD=VALUE needs --config FILE")
    _check_names(parser, args)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for library in ("gcsfs", "absl"):  # they log tracebacks of what we tell in a sentence; absl is Orbax's, too
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        with interrupts.second_interrupt_quits(alone):
            result = args.run(args)
    except KeyboardInterrupt as error:
        _leave(STOPPED, error)
        interrupts.quit()
    except BrokenPipeError:  # of a command that takes our output, such as head, and has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last place: all others end as a sentence and an exit code
        code = _leave(_report(error), error)
        if code == PREEMPTED and alone:
            interrupts.end_after_saving()
        return code
    if args.json:
        print(strict_json.line(result))
    return 0


def _check_names(parser, args):
    """Refuses names that are empty, or of a kind of place that nothing here can read."""
    given = {name: value for name, value in vars(args).items() if isinstance(value, str) and name not in TEXTS}
    for name, value in given.items():
        if not value:
            parser.error(f"--{name.replace('_', '-')} is empty; is a variable of the shell not set?")
    for value in (*given.values(), *getattr(args, "overrides", ())):
        scheme = re.search(r"(?:^|=)(\w+)://", value)
        if scheme and scheme[1] not in SCHEMES:
            parser.error(f"{value}: nothing here reads {scheme[1]}://; name a folder of this machine, or gs://…")


def _with_home(argv) -> list[str]:
    """Arguments with the home folder for a `~` behind an =, as in `--workdir=~/runs/a`, which shells leave to us."""
    home, texts = os.path.expanduser("~"), {f"--{name}" for name in TEXTS}
    return [
        item if texts & {before, item.partition("=")[0]} else item.replace("=~/", f"={home}/")
        for before, item in itertools.pairwise(["", *argv])
    ]


def _print_unraisable(fault):
    """Python's own printing, but of the writers of a save that failed: each says that nobody waits for it."""
    if str(fault.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(fault)


def _tasks():
    """What each task of `lmm evaluate` reads; the other verbs do without what the tasks import."""
    from lmm_jax.evaluation.tasks import TASKS

    return {name: task.FILES for name, task in TASKS.items()}


def _datasets():
    """Help texts of the data sets; their modules import numpy, which other verbs' `--help` need not wait for."""
    from lmm_jax.data.prepare.datasets import DATASETS

    first_lines = {name: dataset.__doc__.splitlines()[0].rstrip(".") for name, dataset in DATASETS.items()}
    return {name: line.replace("%", "%%") for name, line in first_lines.items()}


def _parser(datasets, tasks):
    """The command line; help names the data sets and tasks that are given, each with what it is."""
    parser = argparse.ArgumentParser(
        prog="lmm",
        description="Train, study and use high-resolution large multimodal models in JAX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="VERB", required=True)

    def verb(run, help):
        name = run.__name__
        sub = subparsers.add_parser(name, help=help, description=run.__doc__, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print one JSON object last")
        sub.set_defaults(run=run)
        return sub

    sub = verb(verbs.prepare, "check pictures and conversations once and write the folder that training reads")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--data", metavar="FILE", help="conversations, JSON, JSONL or Parquet: LLaVA's or role/content rows"
    )
    told = "; ".join(f"{name} - {what}" for name, what in datasets.items())
    which.add_argument("--dataset", metavar="NAME", choices=list(datasets), help=told)
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    told = "rows are split by their pictures, or ids if they have none: all rows of a picture lie on one side"
    of_data = sub.add_argument_group("with --data", told)
    of_data.add_argument("--images", metavar="DIR", help="folder of the pictures (default: that of the file)")
    told = "allow links in the folder of the pictures that lead out of it"
    of_data.add_argument("--follow-links", action="store_true", default=None, help=told)
    told = "its file, or its folder (default: a small one is trained)"
    of_data.add_argument("--tokenizer", metavar="PATH", help=told)
    of_data.add_argument("--template", metavar="NAME", help="layout of the prompts (default: vicuna_v1)")
    of_data.add_argument("--workers", type=int, metavar="N", help="processes that check rows (default: processors)")
    told = "share of the rows of which more refused ones stop the run (default: 0.05)"
    of_data.add_argument("--max-refused", type=float, metavar="S", help=told)
    told = "rows of FILE that are kept to {}: a number of them, such as 500, or a share, such as 0.05"
    of_data.add_argument("--validation", metavar="N|SHARE", help=told.format("validate with"))
    of_data.add_argument("--test", metavar="N|SHARE", help=told.format("test with"))
    told = "file of the rows to {}, instead of a number of those of FILE"
    of_data.add_argument("--validation-data", metavar="FILE", help=told.format("validate with"))
    of_data.add_argument("--test-data", metavar="FILE", help=told.format("test with"))
    of_dataset = sub.add_argument_group("with --dataset")
    told = "what to make it from, for a data set that does not bring its own"
    of_dataset.add_argument("--source", metavar="DIR", help=told)
    told = "training rows (default: as many as the data set says)"
    of_dataset.add_argument("--rows", type=int, metavar="N", help=told)

    sub = verb(verbs.train, "train a model, or continue a run")
    _config_argument(sub, required=True)
    sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    sub.add_argument("--profile", type=_whole, default=0, metavar="N", help="trace N steps to WORKDIR/profile")
    told = "begin at step 0 again in a workdir whose checkpoints are gone (default: that is refused)"
    sub.add_argument("--restart", action="store_true", help=told)
    _cache_argument(sub)

    sub = verb(verbs.evaluate, "score a model at each number of visual tokens")
    _model_argument(sub, required=False)
    _cache_argument(sub)
    told = "; ".join(
        ["tasks (default: that of the data trained on)", *(f"{name} reads {files}" for name, files in tasks.items())]
    )
    sub.add_argument("--tasks", metavar="A,B", help=told)
    sub.add_argument(
        "--scales",
        default="all",
        metavar="N,N",
        help="visual tokens of a picture, such as 1,9,36; auto, where the model chooses (default: all trained)",
    )
    told = "folder of the tasks, or one of each: --data digits=DIR,pages=DIR (default: the one trained on)"
    sub.add_argument("--data", metavar="DIR|TASK=DIR,…", help=told)
    sub.add_argument("--split", metavar="NAME", help="split of the folder (default: the task's own, mostly test)")
    sub.add_argument("--limit", type=_count, metavar="N", help="questions of each kind (default: all)")
    told = "folder of the results: every answer, a summary, plots (default: that of the model)"
    sub.add_argument("--out", metavar="DIR", help=told)
    told = "leave out questions whose pictures are missing or damaged, and name them (default: none is asked then)"
    sub.add_argument("--skip-bad", action="store_true", help=told)
    of_needs = sub.add_argument_group("how many tokens are needed")
    told = "write OUT/oracle_TASK.html: what each question needs, which are hard, what falls as tokens grow"
    of_needs.add_argument("--oracle", action="store_true", help=told)
    told = "fit how the model chooses the budget of a question, scale auto (default split: validation)"
    of_needs.add_argument("--fit-auto", action="store_true", help=told)
    told = "which cells become tokens, without training for it: zip, random or strided (default: as it was trained)"
    of_needs.add_argument("--reduction", metavar="NAME", help=told)
    of_others = sub.add_argument_group("without a model")
    told = "compare two result files, OUT/evaluation/TASK/SCALE.jsonl, question by question"
    of_others.add_argument("--compare", nargs=2, metavar="FILE", help=told)
    told = "print which files the tasks read, where they are to be had, and how answers are scored"
    of_others.add_argument("--describe", action="store_true", help=told)

    sub = verb(verbs.generate, "answer a question about pictures, or many questions")
    _model_argument(sub)
    _cache_argument(sub)
    told = "pictures of the question; or folders, to ask it of every picture in them"
    sub.add_argument("--image", nargs="+", default=[], metavar="FILE|DIR", help=told)
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", metavar="TEXT", help="the question")
    told = (
        "many questions: JSONL, or a question a line in a file that ends in .txt, which are all asked about --image"
    )
    which.add_argument("--prompts", metavar="FILE", help=told)
    of_many = sub.add_argument_group("many questions")
    told = "JSONL to write, an answer a line as they come (default: print them); the same command continues it"
    of_many.add_argument("--out", metavar="FILE", help=told)
    told = "folder of the pictures that the lines name (default: that of the file)"
    of_many.add_argument("--images", metavar="DIR", help=told)
    told = "allow links in that folder that lead out of it"
    of_many.add_argument("--follow-links", action="store_true", help=told)
    told = "write why a question cannot be asked in the place of its answer (default: none is asked then)"
    of_many.add_argument("--skip-bad", action="store_true", help=told)
    _sampling_arguments(sub)
    told = "tell on stderr: time to the first token, tokens a second, visual tokens, compiled programs"
    sub.add_argument("--verbose", action="store_true", help=told)

    sub = verb(verbs.chat, "hold a conversation about pictures")
    _model_argument(sub)
    _cache_argument(sub)
    sub.add_argument("--system", metavar="TEXT", help="the system turn (default: that of the model's template)")
    _sampling_arguments(sub)

    sub = verb(verbs.demo, "a page on which a model is asked, at several numbers of visual tokens side by side")
    _model_argument(sub)
    _cache_argument(sub)
    told = "address to listen at (default: 127.0.0.1, which this machine alone reaches)"
    sub.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=told)
    sub.add_argument("--port", type=_count, metavar="N", help="(default: 7860, or the next that is free)")
    told = "megabytes that a picture may have (default: 20)"
    sub.add_argument("--max-upload", type=_count, default=20, metavar="N", help=told)

    sub = verb(verbs.export, "write a trained model as a folder that transformers or LLaVA's own code loads")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of a run")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    sub.add_argument(
        "--layout", default="hf", choices=["hf", "llava"], help="of transformers (hf), or LLaVA's original one"
    )
    sub.add_argument(
        "--verify",
        action="store_true",
        help="run the folder in transformers beside our model and compare: extra 'hf'",
    )
    told = "write the run's adapters alone, as PEFT loads them (default: merged into the model)"
    sub.add_argument("--adapter", action="store_true", help=told)

    sub = verb(verbs.compile, "ask the TPU compiler, without a TPU: does a step fit a slice, and what does it cost?")
    _config_argument(sub, required=True)
    sub.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="slice by its number of chips: v5e-64, v6e-256, v5p-128; 2xv5e-64 for two …",
    )
    sub.add_argument("--step", choices=["train", "prefill", "decode"], default="train", help="(default: train)")
    sub.add_argument(
        "--prompts", type=_count, metavar="N", help="prompts at a time, over all devices (with prefill and decode)"
    )
    sub.add_argument("--fit", action="store_true", help="find the largest batch that fits and its remat policy")

    sub = verb(verbs.show, "look at parameters, their sharding, a batch as the model sees it, or a config's fields")
    sub.add_argument("what", choices=["params", "sharding", "batch", "config"])
    _config_argument(sub)
    sub.add_argument("--workdir", metavar="DIR", help="folder of a run, instead of --config")
    sub.add_argument(
        "--model",
        metavar="DIR",
        help="folder of a released model: `params` lists what becomes of each of its tensors",
    )
    sub.add_argument("--allow-pickle", action="store_true", help=PICKLE)
    sub.add_argument("--packs", type=_count, default=8, metavar="N", help="packs on the page of `batch` (default: 8)")
    sub.add_argument("--out", metavar="FILE", help="HTML page that `batch` writes (default: batch.html)")

    sub = verb(verbs.bench, "measure how fast a part runs here, beside a ceiling or a PyTorch peer")
    sub.add_argument("what", choices=["train", "decode", "attention", "guards", "data"])
    model = sub.add_argument_group(
        "train, decode, attention, guards: one device, beside ceilings measured in the same run"
    )
    model.add_argument("--shape", metavar="NAME|FILE", help="base, small, llava_1b, llava15_7b, or a JSON file")
    model.add_argument("--dtype", default="float32", choices=DTYPES, help="of the computation (default: float32)")
    model.add_argument(
        "--steps", type=_count, default=5, metavar="N", help="timed steps, whose median counts (default: 5)"
    )
    model.add_argument(
        "--peer", action="store_true", help="also run transformers' LLaVA in PyTorch, to compare with: extra 'hf'"
    )
    of_train = sub.add_argument_group("train")
    told = "dtype of parameters and optimizer (default: both --dtype and float32)"
    of_train.add_argument("--state", choices=DTYPES, help=told)
    of_train.add_argument("--checkpoint", action="store_true", help="recompute layers in the backward pass")
    of_train.add_argument("--compile-peer", action="store_true", help="run the peer under torch.compile")
    told = "measure time against visual tokens and pixels instead, and draw DIR/growth.png"
    of_train.add_argument("--growth", metavar="DIR", help=told)
    of_data = sub.add_argument_group("data: what one CPU core reads, and how many cores a host needs")
    _config_argument(of_data)
    of_data.add_argument(
        "--photographs", type=_count, metavar="N", help="read N synthetic photographs instead of the config's data"
    )
    of_data.add_argument("--records", type=_count, default=200, metavar="N", help="records to read (default: 200)")
    told = "time of a training step (default: what a TPU chip takes at its peak rate)"
    of_data.add_argument("--step-seconds", type=_seconds, metavar="S", help=told)
    told = "packs that a host reads for a step (default: train.batch_size)"
    of_data.add_argument("--packs", type=_count, metavar="N", help=told)
    return parser


DTYPES = ("float32", "bfloat16")
PICKLE = "read PyTorch's .bin files, by torch's weights-only reader"


def _model_argument(sub, required=True):
    which = sub.add_mutually_exclusive_group(required=required)
    which.add_argument("--workdir", metavar="DIR", help="folder of a run")
    which.add_argument("--model", metavar="DIR", help="folder of an export, or as released by LLaVA or llava-hf")
    sub.add_argument("--allow-pickle", action="store_true", help=PICKLE)
    told = "folder of adapters as PEFT writes them, merged into the model (default: none)"
    sub.add_argument("--adapter", metavar="DIR", help=told)


def _cache_argument(sub):
    told = "compile anew what was compiled before, and keep nothing of it (see LMM_CACHE in launch/README.md)"
    sub.add_argument("--no-compile-cache", dest="compile_cache", action="store_false", help=told)


def _sampling_arguments(sub):
    """What a question may have, beside its text and pictures: `generation.chat.OPTIONS`."""
    of_answer = sub.add_argument_group("the answer")
    told = "visual tokens of a picture (default: the largest number trained); auto, for a model that chooses"
    of_answer.add_argument("--scale", type=_scale, metavar="N|auto", help=told)
    told = "most pixels of a picture, for a model whose pictures keep their sizes (default: as it was trained)"
    of_answer.add_argument("--max-pixels", type=_count, metavar="N", help=told)
    told = "most tokens of an answer (default: 64, or what the length that was trained leaves)"
    of_answer.add_argument("--max-new-tokens", type=_count, metavar="N", help=told)
    told = "0 takes the most probable token (default); above, tokens are drawn, 1 as the model has it"
    of_answer.add_argument("--temperature", type=float, metavar="T", help=told)
    told = "draw from so many of the most probable tokens (default: 0, all)"
    of_answer.add_argument("--top-k", type=_whole, metavar="K", help=told)
    told = "draw from the most probable tokens that have this probability together (default: 1, all)"
    of_answer.add_argument("--top-p", type=float, metavar="P", help=told)
    told = "above 1, what was said becomes less probable (default: 1)"
    of_answer.add_argument("--repetition-penalty", type=float, metavar="R", help=told)
    told = "end the answer before this text; may be given several times"
    of_answer.add_argument("--stop", action="append", metavar="TEXT", help=told)
    told = "of what is drawn: the same seed gives the same answer (default: 0; of many questions, 0, 1, 2, …)"
    of_answer.add_argument("--seed", type=_whole, metavar="N", help=told)
    told = "leave out the oldest turns of a conversation that is too long, instead of refusing it"
    of_answer.add_argument("--truncate", action="store_true", default=None, help=told)


def _config_argument(sub, required=False):
    sub.add_argument(
        "--config",
        required=required,
        metavar="F[:k=v,…]",
        help="config file and its arguments; --config.a.b=v overrides any field",
    )


def _count(text):
    """The type of an argument that counts something, for argparse: a whole number of 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is valid, not '{text}'")
    return int(text)


def _scale(text):
    """The type of a number of visual tokens, for argparse; "auto" is left to the model."""
    return text if text == "auto" else _count(text)


def _whole(text):
    """The type of an argument that may be 0, for argparse: a whole number."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"a whole number of 0 or more is valid, not '{text}'")
    return int(text)


def _seconds(text):
    """The type of an argument that is a time, for argparse: a finite number above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 is valid, not '{text}'")
    return seconds


def _take_overrides(rest):
    """Splits `--config.a.b=v` and `--config.a.b v` from the other arguments."""
    overrides, others = [], []
    items = iter(rest)
    for item in items:
        if item.startswith("--config."):
            name = item.removeprefix("--config.")
            overrides.append(name if "=" in name else f"{name}={next(items, '')}")
        else:
            others.append(item)
    return overrides, others


def _leave(code, error) -> int:
    """The exit code; where other hosts wait for this one they end too, unless all were preempted together."""
    from lmm_jax.pods import hosts

    if code != PREEMPTED:
        hosts.leave(code, f"{type(error).__name__}: {error}")
    return code


def _report(error) -> int:
    """Prints an error as a sentence, or with its traceback where it is a fault of ours; see `errors`."""
    from lmm_jax.pods import hosts, wire

    if isinstance(error, wire.MissingHost):
        print(f"lmm: {error}", file=sys.stderr)
        return 1
    hosts.settle()
    loop = sys.modules.get("lmm_jax.training.loop")  # which a verb that does not train may not need
    if loop and isinstance(error, loop.Preempted):
        print(f"lmm: {error}", file=sys.stderr)
        return PREEMPTED
    told = errors.explain(error)
    if told:
        sentence, code = told
        print(f"lmm: error: {sentence}", file=sys.stderr)
        return code
    traceback.print_exception(error)
    print(errors.REPORT, file=sys.stderr)
    return 1
