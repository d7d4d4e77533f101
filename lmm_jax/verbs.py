"""What each verb of `lmm` does: a function of its arguments that prints, and returns what `--json` prints.

A verb's help text is the docstring of its function. Heavy imports happen inside, so that `lmm --help` is instant.
"""

import json
import os
import re
import sys


def prepare(args):
    """Opens every picture, tokenises every conversation, and writes the folder that training reads.

    What cannot be used is left out and listed with its reason. The same command starts an interrupted run again and
    leaves a finished folder as it is.
    """
    from lmm_jax.config import ConfigError
    from lmm_jax.data.prepare import folder, summary

    options = {
        "--data": (
            *("images", "follow_links", "tokenizer", "template", "workers", "max_refused"),
            *("validation", "test", "validation_data", "test_data"),
        ),
        "--dataset": ("rows", "source"),
    }
    mine, other = ("--data", "--dataset") if args.data else ("--dataset", "--data")
    for name in options[other]:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} goes with {other}, not with {mine}")
    given = {name: getattr(args, name) for name in options[mine] if getattr(args, name) is not None}
    if args.data:
        result = folder.prepare_rows(args.data, given.pop("images", None), args.out, **given)
    else:
        result = folder.prepare_dataset(args.dataset, args.out, **given)
    print(summary.report(args.out, result))
    return result


def train(args):
    """Trains a model. The same command continues from the newest sound checkpoint, on any number of devices."""
    from lmm_jax.config import load_config
    from lmm_jax.pods import hosts

    config = load_config(args.config, *args.overrides)
    hosts.start(folder=args.workdir)  # before all that takes a while to import
    import jax

    from lmm_jax.tools import plots
    from lmm_jax.training.loop import train

    _keep_programs(args)
    result = train(config, args.workdir, profile=args.profile, restart=args.restart)
    if jax.process_index() == 0:
        _draw(lambda: plots.draw_loss(args.workdir))
    return result


def evaluate(args):
    """Asks every question of the tasks at each number of visual tokens, and draws accuracy against tokens.

    Every answer is kept in OUT/evaluation as it comes; the same command continues what was interrupted, on any number
    of hosts. --oracle adds a page that shows what each question needs. --fit-auto teaches the model to choose, on the
    split that is asked: then --scales auto, and --scale auto of the other verbs.
    """
    if args.compare:
        _refuse_beside("--compare", args, ("tasks", "describe", *ASKED_WITH))
        return _compare(*args.compare)
    if args.describe:
        _refuse_beside("--describe", args, ASKED_WITH)
        return _describe(args.tasks)
    if not (args.workdir or args.model):
        raise ValueError("name a model by --workdir DIR or by --model DIR")
    from lmm_jax.pods import hosts

    seen_by_all = args.out or args.workdir or args.model
    hosts.start(in_step=False, folder=seen_by_all)  # before all that takes a while to import
    import jax

    from lmm_jax import evaluation, storage
    from lmm_jax.evaluation import auto, summary
    from lmm_jax.generation.model import load
    from lmm_jax.tools import plots

    folder, data = args.workdir or args.model, _folders(args.data)
    scales = _scales(args.scales)
    split = args.split or ("validation" if args.fit_auto else None)
    if args.reduction and not args.out:
        raise ValueError(
            f"--reduction={args.reduction} gives other answers than the model's own, which {folder} keeps: name a "
            "folder for them by --out DIR"
        )
    if args.adapter and not args.out:
        raise ValueError(
            f"--adapter={args.adapter} gives other answers than the model's own, which {folder} keeps: name a folder "
            "for them by --out DIR"
        )
    if args.adapter and (args.fit_auto or "auto" in (scales or ())):
        raise ValueError("--fit-auto and --scales auto are for a model itself, without --adapter")
    if args.reduction and args.fit_auto:
        raise ValueError("--fit-auto is for the model as it was trained, without --reduction")
    if args.reduction and "auto" in (scales or ()):
        raise ValueError("--scales auto is for the model as it was trained, without --reduction")
    if args.fit_auto and "auto" in (scales or ()):
        raise ValueError("--fit-auto asks at fixed budgets; --scales auto is for a command of its own, afterwards")
    if args.fit_auto and not storage.is_remote(folder):
        storage.check_place(folder, "--fit-auto writes auto.json to")
    # What the model reaches on the split that it learns to choose on is no result of it.
    out = args.out or (os.path.join(folder, "fit_auto") if args.fit_auto else folder)
    if not storage.is_remote(out):
        storage.check_place(out, "--out")
    _keep_programs(args)
    model = load(folder, allow_pickle=args.allow_pickle, reduction=args.reduction, adapter=args.adapter)
    tasks = args.tasks.split(",") if args.tasks else evaluation.find_tasks(model, data)
    if args.fit_auto and len(tasks) > 1:
        raise ValueError(f"--fit-auto fits to the questions of one task, and these are {', '.join(tasks)}")
    budgets = {scale for scale in scales or model.scales if scale != "auto"}
    if args.fit_auto:
        auto.check_budgets(model, budgets)
    if args.oracle and len(budgets) < 2:
        raise ValueError("--oracle needs answers at two budgets or more, as --scales all gives of M3's models")
    options = {"out": out, "skip_bad": args.skip_bad, "scored": args.oracle or args.fit_auto}
    found = evaluation.evaluate_tasks(model, tasks, scales, data, args.limit, split, **options)
    if jax.process_index() > 0:
        return found.results
    print(evaluation.table(found.results))
    if args.fit_auto:
        model.auto = auto.fit_to(model, found, tasks[0])
        print(auto.words(model.auto))
    try:
        if args.fit_auto:
            model.auto.save(folder)
        evaluation.save_results(found.results, os.path.join(out, "evaluation.json"))
        summary.write_summary(model, found, os.path.join(out, "evaluation.md"))
        for path in found.submissions:
            print(f"for the server or the judge: {path}")
        for task, asked in found.asked.items():
            answered = len(next(iter(found.runs[task].values())))
            if found.submissions and answered < asked.examples:
                print(f"they hold {answered:,} of the {asked.examples:,} questions of {task}")
        for task in found.results if args.oracle else ():
            print(_draw_needs(model, found, task, os.path.join(out, f"oracle_{task}.html")))
    except OSError as error:  # what took hours to find out has been said by now
        if args.json:
            print(json.dumps(found.results))
        raise OSError(f"the results above are not saved: {error}; name a folder for them by --out DIR") from error
    _draw(lambda: plots.draw_accuracy(found.results, out))
    shown = {"split": split, "scales": scales, "limit": args.limit}
    _draw(lambda: plots.draw_answers(model, data, out, tasks[0], **shown))
    return found.results


def _draw_needs(model, found, task, path):
    """The page of `lmm evaluate --oracle`; returns its path."""
    from lmm_jax.evaluation import auto
    from lmm_jax.tools import oracle_page

    runs = {scale: records for scale, records in found.runs[task].items() if scale.isdigit()}
    of_auto = None
    if model.auto is not None and model.auto.scales == tuple(sorted(map(int, runs))):
        of_auto = auto.report(model.auto, auto.collect(runs))
        of_auto["fitted_here"] = auto.is_fitted_on(model.auto, task, found.asked[task])
        print(auto.report_words(of_auto))
    return oracle_page.write(path, task, runs, found.questions(task), of_auto)


# What a model is asked with, and how: nothing for flags of `lmm evaluate` that need no model.
ASKED_WITH = (
    *("workdir", "model", "allow_pickle", "data", "split", "limit", "out", "skip_bad", "oracle", "fit_auto"),
    *("reduction", "adapter"),
)


def _refuse_beside(flag, args, names):
    """Raises ValueError if one of the arguments `names` was given beside a flag that has no use for it."""
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with {flag}, which asks no model; leave it out")
    if args.scales != "all":
        raise ValueError(f"--scales does not go with {flag}, which asks no model; leave it out")


def _scales(text):
    """What `--scales` of `lmm evaluate` says: budgets, "auto" among them; None for all trained ones."""
    if text == "all":
        return None
    return [one if one == "auto" else _integer("--scales", one) for one in text.split(",")]


def _compare(first, second):
    """`lmm evaluate --compare A B`."""
    from lmm_jax.evaluation import compare, records

    found = compare.compare(records.read(first), records.read(second), names=(first, second))
    print(compare.text(found))
    return {
        "difference": found.all.difference,
        "low": found.all.low,
        "high": found.all.high,
        "questions": found.all.questions,
    }


def _describe(names):
    """`lmm evaluate --describe`: the help pages of tasks."""
    from lmm_jax.config import choose
    from lmm_jax.evaluation.tasks import TASKS

    tasks = {name: choose("task", name, TASKS) for name in (names.split(",") if names else TASKS)}
    for name, task in tasks.items():
        print(f"# {name}\n\nreads {task.FILES}\n\n{(task.__doc__ or '').strip()}\n")
    return {}


def _folders(text):
    """What `--data` of `lmm evaluate` says: a folder, or a dict {task: folder} of `task=DIR,task2=DIR`."""
    items = (text or "").split(",")
    if all(re.fullmatch(r"\w+=.+", item) for item in items):  # a path with a = in it has a / before, if need be ./
        return dict(item.split("=", 1) for item in items)
    return text


def generate(args):
    """Answers a question about pictures, as it comes on a terminal; or many questions, as one queue.

    --scale is any number of visual tokens that tiles the encoder's grid, whether it was trained or not. A folder in
    the place of a picture asks the question of every picture in it, and in the folders in it. The lines of --prompts
    are objects such as {"id": "a", "prompt": "What is it?", "image": "cat.jpg", "scale": 9}, where an option counts
    for its line. With --out, the same command continues what was interrupted.
    """
    from lmm_jax.pods import hosts

    hosts.refuse("lmm generate")
    from lmm_jax.asking import answers, ask
    from lmm_jax.asking.questions import check_options
    from lmm_jax.generation.model import load
    from lmm_jax.generation.prompts import read_pictures, read_sizes

    options = _options(args)
    check_options(options)  # this and all up to the loading, before minutes are spent on it
    questions = _questions(args, options)
    if questions is None:
        read_sizes("--image", read_pictures("--image", args.image))
    else:
        if args.out:
            answers.check_place(args.out)
        ask.check_all(None, questions, args.skip_bad)
    _keep_programs(args)
    model = load(args.workdir or args.model, allow_pickle=args.allow_pickle, adapter=args.adapter)
    if questions is None:
        streams = sys.stdout.isatty() and not args.json
        return ask.ask_one(model, args.image, args.prompt, options, streams, args.verbose)
    return ask.ask_many(model, questions, args.out, args.skip_bad, args.verbose)


def chat(args):
    """Holds a conversation on the terminal: /help says what can be typed. Piped in, each line is a question."""
    from lmm_jax.pods import hosts

    hosts.refuse("lmm chat")
    from lmm_jax.asking.questions import check_options
    from lmm_jax.asking.terminal import Terminal
    from lmm_jax.generation.model import load

    options = _options(args)
    check_options(options)
    _keep_programs(args)
    model = load(args.workdir or args.model, allow_pickle=args.allow_pickle, adapter=args.adapter)
    Terminal(model, args.system, options).run()
    return {}


def _options(args):
    """The options of a question that were given."""
    from lmm_jax.generation.chat import OPTIONS

    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}


def _questions(args, options):
    """The questions of `lmm generate` that are many; None for a single one."""
    from etils import epath

    from lmm_jax.asking.questions import questions_about, read_questions
    from lmm_jax.config import ConfigError

    folders = [image for image in args.image if epath.Path(image).is_dir()]
    if args.prompts:
        if folders:
            raise ConfigError(
                f"--image {folders[0]} is a folder, which goes with --prompt; --prompts asks many already"
            )
        return read_questions(args.prompts, args.images, args.follow_links, args.image, options)
    for name in ("images", "follow_links"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} goes with --prompts, whose lines name pictures")
    if folders:
        other = [image for image in args.image if image not in folders]
        if other:
            raise ConfigError(f"--image: {folders[0]} is a folder and {other[0]} is none; ask about one or the other")
        return questions_about(folders, args.prompt, options)
    for name in ("out", "skip_bad"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} goes with --prompts, or with a folder of pictures")
    return None


def _keep_programs(args):
    """Keeps what is compiled on disk, and takes from there what was compiled before; see `compile_cache`."""
    if args.compile_cache:
        from lmm_jax import compile_cache

        compile_cache.start()


def demo(args):
    """Opens a page on which the model is asked: a picture, a question, answers at several numbers of visual tokens.

    It also shows what each visual token stands for, and which stack is added before which layer. Needs the extra
    'demo'.
    """
    from lmm_jax.pods import hosts

    hosts.refuse("lmm demo")
    try:
        from lmm_jax.demo import page
    except ImportError as error:
        raise ImportError(f"lmm demo needs gradio ({error}): pip install 'lmm_jax[demo]'") from error
    from lmm_jax.generation.model import load

    page.check_address(args.host, args.port)  # before minutes are spent on loading
    folder = args.workdir or args.model
    _keep_programs(args)
    model = load(folder, allow_pickle=args.allow_pickle, adapter=args.adapter)
    page.serve(model, folder, args.host, args.port, args.max_upload)
    return {}


def export(args):
    """Writes the newest sound checkpoint of a run as a folder that others load; interrupted, it leaves no folder."""
    from lmm_jax.pods import hosts

    hosts.refuse("lmm export")
    from lmm_jax.release.export import export

    result = export(args.workdir, args.out, args.layout, args.verify, args.adapter)
    print(f"{args.out}: {', '.join(result['files'])}")
    return result


def compile(args):
    """Compiles the real step for a TPU slice on this machine, without a TPU.

    Says whether it fits, what it moves between chips, and the least time that it takes. Needs the extra 'compile'.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed, JAX would look for a TPU first
    from lmm_jax.aot import compile as tool
    from lmm_jax.aot.fit import fit_config
    from lmm_jax.aot.report import report
    from lmm_jax.config import ConfigError, load_config

    config = load_config(args.config, *args.overrides)
    if args.step == "train" and args.prompts:
        raise ConfigError("--prompts goes with --step prefill and decode; a training step has train.batch_size")
    if not args.fit:
        result = tool.compile(config, args.topology, args.step, args.prompts)
        print(report(result))
        return result
    if args.step != "train":
        raise ConfigError("--fit goes with --step train")
    result = fit_config(config, args.topology)
    print(report(result))
    if result["packs"]:
        print(
            f"largest batch: {result['packs']} packs a device: --config.train.batch_size={result['batch_size']} "
            f"--config.model.decoder.remat={result['remat']}"
        )
    return result


def show(args):
    """Prints parameters with their learning rates, or how they lie on the devices of the mesh.

    `batch` writes an HTML page of packs as the model sees them. `config` prints every field with its value, what it
    may be and what it means; without --config and --workdir, those that config files start from.
    """
    from lmm_jax.config import ConfigError, base, load_config, read_config
    from lmm_jax.tools import batch_page, show

    if args.what == "config" and not (args.config or args.workdir or args.model):
        text = show.config_table(base())
        print(text)
        return {"table": text}
    if bool(args.config) + bool(args.workdir) + bool(args.model) != 1:
        raise ConfigError("lmm show needs one of --config, --workdir and --model")
    if args.model:
        if args.what != "params":
            raise ConfigError(f"lmm show {args.what} needs --config or --workdir; --model goes with params")
        text = show.tensor_table(args.model, args.allow_pickle)
        print(text)
        return {"table": text}
    if args.config:
        config = load_config(args.config, *args.overrides)
    else:
        config = read_config(os.path.join(args.workdir, "config.json"))
    if args.what == "batch":
        path = batch_page.write_page(config, args.packs, args.out or "batch.html")
        print(path)
        return {"path": path}
    tables = {"params": show.param_table, "sharding": show.sharding_table, "config": show.config_table}
    text = tables[args.what](config)
    print(text)
    return {"table": text}


def bench(args):
    """Measures one part and prints a table: each value beside a ceiling, or a PyTorch peer, of the same run."""
    import dataclasses

    from lmm_jax.bench.measure import table
    from lmm_jax.bench.run import run

    needed, other = ("config", "shape") if args.what == "data" else ("shape", "config")
    if not getattr(args, needed):
        raise ValueError(f"lmm bench {args.what} needs --{needed}")
    if getattr(args, other):
        raise ValueError(f"lmm bench {args.what} takes --{needed}, not --{other}")
    if args.growth and (args.what != "train" or args.peer):
        raise ValueError("--growth goes with lmm bench train alone, and without --peer")
    rows = run(args)
    print(table(rows))
    if args.growth:
        from lmm_jax.tools.plots import draw_growth

        _draw(lambda: draw_growth(args.growth))
    return {"rows": [dataclasses.asdict(row) for row in rows]}


def _draw(draw):
    """Draws, or says why not: what is drawn was printed or saved before."""
    try:
        print(draw())
    except ImportError as error:
        print(f"not drawn: {error}; pip install 'lmm_jax[plots]'")
    except OSError as error:
        print(f"not drawn: {error}")


def _integer(flag, text):
    from lmm_jax.config import ConfigError

    if not text.isdigit():
        raise ConfigError(f"{flag}: expected whole numbers separated by commas, or all; got '{text}'")
    return int(text)
