"""Public benchmarks from small folders in each layout that is published, whole and damaged in every way."""

import copy
import io
import json

import pytest
from PIL import Image

from lmm_jax.config import ConfigError
from lmm_jax.data.images import open_picture
from lmm_jax.evaluation.tasks import TASKS, published

PEOPLE = ["nokia"] * 4 + ["nokia phone", "", "Nokia", "unanswerable", "toshiba", "htc"]


def write(path, content):
    """JSON, text or a picture, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jpg", ".png"):
        Image.new("RGB", (40, 30), content).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def textvqa(folder, split="val"):
    rows = [
        {"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "what is the Brand of this camera?"},
        {"question_id": 34603, "image_id": "003a8ae2ef43b901", "question": "what does it say?"},
    ]
    if split != "test":
        rows = [row | {"answers": PEOPLE, "set_name": split} for row in rows]
    write(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": rows})
    tokens = {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL"], "ocr_info": []}
    write(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"data": [tokens]})
    write(folder / ("test_images" if split == "test" else "train_images") / "003a8ae2ef43b901.jpg", "red")


def docvqa(folder, split="val", questions="", pictures="documents"):
    row = {"questionId": 49153, "question": "What is the ‘actual’ value?", "image": "documents/pybv0228_81.png"}
    rows = [row | {"docId": 14465}, row | {"questionId": 24580, "image": "documents/a.png"}]
    if split != "test":
        for row, types in zip(rows, (["figure/diagram"], ["table/list", "form"]), strict=True):
            row |= {"question_types": types, "answers": ["0.28", ".28"]}
    name = "test_v1.0.json" if split == "test" else f"{split}_v1.0_withQT.json"
    write(folder / questions / name, {"dataset_name": "SP-DocVQA", "data": rows})
    for name in ("pybv0228_81.png", "a.png"):
        write(folder / pictures / name, "white")


def chartqa(folder, root="ChartQA Dataset/test", split="test"):
    for kind, label in (("human", "14"), ("augmented", "Yes")):
        row = {"imgname": "41699051005347.png", "query": "How many food items are shown?", "label": label}
        write(folder / root / f"{split}_{kind}.json", [row])
    write(folder / root / "png/41699051005347.png", "white")


def pope(folder, root="output/coco"):
    for kind in ("random", "popular", "adversarial"):
        asked = [("Is there a snowboard in the image?", "yes"), ("Is there a dining table in the image?", "no")]
        rows = [
            {"question_id": n, "image": "COCO_val2014_000000310196.jpg", "text": text, "label": label}
            for n, (text, label) in enumerate(asked, start=1)
        ]
        write(folder / root / f"coco_pope_{kind}.json", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "val2014/COCO_val2014_000000310196.jpg", "red")


def gqa(folder, root=""):
    row = {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No, it is not."}
    rows = {
        "201307251": row | {"types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"}},
        "201640614": row | {"answer": "girl", "types": {"structural": "query", "semantic": "rel"}},
    }
    write(folder / root / "testdev_balanced_questions.json", rows)
    write(folder / "images/n161313.jpg", "red")


def vqav2(folder, split="val"):
    name, images = {"val": ("val2014", "val2014"), "test-dev": ("test-dev2015", "test2015")}[split]
    rows = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "Is it?", "question_id": 262148001},
    ]
    write(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {"info": {}, "questions": rows})
    if split == "val":
        answers = [
            [
                {"answer": answer, "answer_confidence": "yes", "answer_id": n}
                for n, answer in enumerate(people, start=1)
            ]
            for people in (["down"] * 7 + ["at table", "skateboard", "the down"], ["yes"] * 10)
        ]
        marks = [
            {"question_id": 262148000 + n, "image_id": 262148, "answers": of, "answer_type": kind}
            for n, (of, kind) in enumerate(zip(answers, ("other", "yes/no"), strict=True))
        ]
        write(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": marks})
    write(folder / f"{images}/COCO_{images}_000000262148.jpg", "red")


def mme(folder, root="MME_Benchmark_release_version/MME_Benchmark"):
    def pair(what):
        ask = f"Is this {what}? Please answer yes or no.\t"
        return f"{ask}Yes\n{ask.replace('this', 'that')}No\n"

    write(folder / root / "artwork/questions_answers_YN/10002.txt", pair("a painting"))
    write(folder / root / "artwork/images/10002.jpg", "red")
    for name in ("0001", "0002"):
        write(folder / root / f"code_reasoning/{name}.txt", pair(name))
        write(folder / root / f"code_reasoning/{name}.png", "red")


def ai2d(folder, root=""):
    def asked(image, **questions):
        rows = {
            text: {"abcLabel": text == "letters", "answerTexts": ["a", "b", "c", "d"], "correctAnswer": right}
            | {"questionId": f"{image}-{n}"}
            for n, (text, right) in enumerate(questions.items())
        }
        write(folder / root / f"questions/{image}.json", {"imageName": image, "questions": rows})
        write(folder / root / f"images/{image}", "gray")

    asked("1000.png", letters=1, words=3)
    asked("9.png", words=0)
    asked("7.png", words=2)  # of the training set
    texts = {"T0": {"id": "T0", "rectangle": [[5, 5], [25, 20]], "replacementText": "A", "value": "sun"}}
    write(folder / root / "annotations/1000.png.json", {"imageName": "1000.png", "text": texts})
    write(folder / root / "ai2d_test_ids.csv", "1000\n9\n5\n")


LAYOUTS = {
    "textvqa": [textvqa, lambda folder: textvqa(folder, "test"), lambda folder: textvqa(folder, "train")],
    "textvqa_ocr": [textvqa, lambda folder: textvqa(folder, "test")],
    "docvqa": [
        docvqa,
        lambda folder: docvqa(folder, questions="spdocvqa_qas", pictures="spdocvqa_images"),
        lambda folder: docvqa(folder, questions="spdocvqa_qas", pictures="spdocvqa_images/documents"),
        lambda folder: docvqa(folder, questions="val", pictures="val/documents"),
        lambda folder: docvqa(folder, "test"),
    ],
    "chartqa": [
        chartqa,
        lambda folder: chartqa(folder, "test"),
        lambda folder: chartqa(folder, ""),
        lambda folder: chartqa(folder, "val", "val"),
    ],
    "pope": [pope, lambda folder: pope(folder, "coco"), lambda folder: pope(folder, "")],
    "gqa": [gqa, lambda folder: gqa(folder, "questions1.2")],
    "vqav2": [vqav2, lambda folder: vqav2(folder, "test-dev")],
    "mme": [mme, lambda folder: mme(folder, "")],
    "ai2d": [ai2d, lambda folder: ai2d(folder, "ai2d")],
}
SPLITS = {("textvqa", 1): "test", ("textvqa", 2): "train", ("textvqa_ocr", 1): "test", ("docvqa", 4): "test"}
SECRET = {("textvqa", 1), ("textvqa_ocr", 1), ("docvqa", 4), ("vqav2", 1)}  # only a server knows the answers
SPLITS |= {("chartqa", 3): "val", ("vqav2", 1): "test-dev"}
CASES = [(name, n, SPLITS.get((name, n), TASKS[name].SPLIT)) for name in LAYOUTS for n in range(len(LAYOUTS[name]))]


@pytest.mark.parametrize(("name", "layout", "split"), CASES)
def test_every_published_layout_is_read(name, layout, split, tmp_path):
    LAYOUTS[name][layout](tmp_path)
    task = TASKS[name]
    found = list(task.examples(tmp_path, split))
    assert len(found) == {"mme": 6, "pope": 6, "ai2d": 3}.get(name, 2)
    for example in found:
        assert open_picture(example.images[0]).size == (40, 30)
        assert example.question and example.group and task.PROMPT.format(question=example.question)
        assert bool(example.answers) == (
            split not in ("test", "test-dev") or name in ("chartqa", "pope", "mme", "ai2d")
        )
    assert len({(example.id, example.question) for example in found}) == len(found)
    faults = task.check(tmp_path, split)
    assert all(fault.startswith("not as published: ") for fault in faults), faults
    assert split != task.SPLIT or any("questions, published are" in fault for fault in faults)
    assert len(list(task.examples(tmp_path, split, limit=0))) == 0
    with pytest.raises(ConfigError, match=r"split of \S+.* 'none' does not exist; choose from"):
        list(task.examples(tmp_path, "none"))
    assert "does not exist" in task.check(tmp_path, "none")[0]


def test_every_task_says_what_it_reads_and_how_it_scores():
    for name, task in TASKS.items():
        assert task.FILES and task.METRIC and "version" in task.METRIC and callable(task.check), name
        if name in LAYOUTS:
            for word in ("Files", "Licence" if name not in ("docvqa", "mme") else "Terms"):
                assert word in task.__doc__, f"{name}: no help about {word}"


def test_what_is_asked(tmp_path):
    for name, layouts in LAYOUTS.items():
        layouts[0](tmp_path / name)
    first = {name: next(iter(TASKS[name].examples(tmp_path / name, TASKS[name].SPLIT))) for name in LAYOUTS}
    asked = {name: TASKS[name].PROMPT.format(question=example.question) for name, example in first.items()}
    short = "\nAnswer the question using a single word or phrase."
    assert asked["textvqa"] == f"What is the brand of this camera?{short}"
    tokens = "\nReference OCR token: DAKOTA, DIGITAL"
    assert asked["textvqa_ocr"] == f"What is the brand of this camera?{tokens}{short}"
    assert asked["docvqa"] == f"What is the ‘actual’ value?{short}"
    assert asked["chartqa"] == "How many food items are shown?\nAnswer the question with a single word."
    assert asked["pope"] == f"Is there a snowboard in the image?{short}"
    assert asked["mme"] == f"Is this a painting?{short}"
    letter = "Answer with the option's letter from the given choices directly."
    assert asked["ai2d"] == f"words\nA. a\nB. b\nC. c\nD. d\n{letter}"
    kinds = {name: first[name].kind for name in LAYOUTS}
    assert kinds == {
        "textvqa": "all", "textvqa_ocr": "all", "docvqa": "figure-diagram", "chartqa": "human", "pope": "random",
        "gqa": "verify", "vqav2": "other", "mme": "artwork", "ai2d": "text",
    }  # fmt: skip
    ids = {name: first[name].id for name in ("textvqa", "docvqa", "chartqa", "pope", "gqa", "vqav2", "mme", "ai2d")}
    assert list(ids.values()) == [
        34602, 49153, "human-0", "random-1", "201307251", 262148000, "artwork/10002.jpg", "9.png-0",
    ]  # fmt: skip
    second = list(TASKS["docvqa"].examples(tmp_path / "docvqa", "val"))[1]
    assert second.kind == "form+table-list"


def answers_of(name, folder, *answers):
    task = TASKS[name]
    return list(zip(task.examples(folder, task.SPLIT), answers, strict=True))


def test_scores(tmp_path):
    for name, layouts in LAYOUTS.items():
        layouts[0](tmp_path / name)

    def score_all(name, *answers):
        return TASKS[name].score_all(answers_of(name, tmp_path / name, *answers))

    assert score_all("textvqa", "Nokia.", "htc") == pytest.approx({"accuracy": (1 + 0.3) / 2})
    found = score_all("docvqa", "0.28", "1")
    assert found == {"anls": 0.5, "figure-diagram/anls": 1.0, "form+table-list/anls": 0.0}
    assert score_all("chartqa", "14.5", "no") == {"relaxed": 0.5, "human/relaxed": 1.0, "augmented/relaxed": 0.0}
    assert score_all("gqa", "No.", "boy") == {"accuracy": 0.5, "verify/accuracy": 1.0, "query/accuracy": 0.0}
    found = score_all("vqav2", "Down", "yes, it is")
    assert found == {"accuracy": 0.5, "other/accuracy": 1.0, "yes-no/accuracy": 0.0}
    assert score_all("ai2d", "A. a", "(B)", "c") == pytest.approx(
        {"accuracy": 2 / 3, "letters/accuracy": 1.0, "text/accuracy": 0.5}
    )
    found = score_all("pope", "Yes", "no", "Yes, a snowboard.", "no", "no", "There is not.")
    assert found["llava_accuracy"] == 5 / 6 and found["lmms_accuracy"] == 3 / 6
    assert found["random/lmms_f1"] == found["popular/llava_f1"] == 1.0 and found["popular/lmms_f1"] == 0.0
    assert found["llava_f1_mean"] == pytest.approx(2 / 3) and found["adversarial/llava_yes_ratio"] == 0.0
    found = score_all("mme", "Yes", "No.", "yes", "no", "yes", "yes")
    assert (found["perception"], found["cognition"], found["total"]) == (200.0, 125.0, 325.0)
    assert (found["artwork/total"], found["code_reasoning/total"]) == (200.0, 125.0) and len(found) == 5


def test_a_picture_of_mme_counts_with_both_its_questions(tmp_path):
    mme(tmp_path)
    assert len(list(TASKS["mme"].examples(tmp_path, "test", limit=1))) == 4  # two of each kind
    pairs = answers_of("mme", tmp_path, *["yes"] * 6)[:-1]
    assert TASKS["mme"].score_all(pairs)["unpaired"] == 1.0
    assert TASKS["mme"].score_all(pairs)["code_reasoning/total"] == 50.0


def test_letters_are_drawn_over_the_texts_of_a_diagram(tmp_path):
    ai2d(tmp_path)
    _, letters, words = TASKS["ai2d"].examples(tmp_path, "test")
    assert isinstance(letters.images[0], bytes) and words.images[0].endswith("images/1000.png")
    drawn, bare = open_picture(io.BytesIO(letters.images[0]).getvalue()), open_picture(words.images[0])
    assert drawn.getpixel((6, 6)) == (255, 255, 255) and drawn.getpixel((35, 25)) == bare.getpixel((6, 6))
    assert min(drawn.crop((5, 5, 25, 20)).convert("L").getextrema()) < 100  # the letter
    (tmp_path / "annotations/1000.png.json").unlink()
    write(tmp_path / "abc_images/1000.png", "blue")
    assert [example.images[0].split("/")[-2] for example in TASKS["ai2d"].examples(tmp_path, "test")] == [
        "images", "abc_images", "images",
    ]  # fmt: skip
    (tmp_path / "abc_images/1000.png").unlink()
    (tmp_path / "abc_images").rmdir()
    with pytest.raises(FileNotFoundError, match=r"has no annotations/1000\.png\.json"):
        list(TASKS["ai2d"].examples(tmp_path, "test"))


def test_submissions_are_what_the_servers_take(tmp_path):
    textvqa(tmp_path, "test")
    docvqa(tmp_path, "test")
    vqav2(tmp_path, "test-dev")
    for name, split, key, said in [
        ("textvqa", "test", "question_id", "2 nokias"),
        ("textvqa_ocr", "test", "question_id", "2 nokias"),
        ("docvqa", "test", "questionId", "The two Nokias."),
        ("vqav2", "test-dev", "question_id", "2 nokias"),
    ]:
        pairs = [(example, "The two Nokias.") for example in TASKS[name].examples(tmp_path, split)]
        assert TASKS[name].score_all(pairs) == {}
        file, content = TASKS[name].submission(pairs)
        rows = json.loads(content)
        assert file.endswith(".json") and [row[key] for row in rows] == [pair[0].id for pair in pairs]
        assert [row["answer"] for row in rows] == [said] * 2 and all(len(row) == 2 for row in rows)


def missing(name, folder, split):
    return [fault for fault in TASKS[name].check(folder, split) if "pictures are missing" in fault]


def test_missing_pictures_are_counted_and_named(tmp_path):
    for name, layouts in LAYOUTS.items():
        folder = tmp_path / name
        layouts[0](folder)
        for picture in [*folder.rglob("*.png"), *folder.rglob("*.jpg")]:
            picture.unlink()
        (fault,) = missing(name, folder, TASKS[name].SPLIT)
        count = {"docvqa": "2 of 2", "mme": "3 of 3", "ai2d": "2 of 2"}.get(name, "1 of 1")
        assert fault.startswith(f"{count} pictures are missing: {folder}"), fault
        for example in TASKS[name].examples(folder, TASKS[name].SPLIT):
            assert published.missing_pictures([example]) == list(example.images)
    row = {"image": "COCO_val2014_0.jpg", "text": "a?", "label": "no"}
    lines = [json.dumps(row | {"question_id": n, "image": f"{n}.jpg"}) for n in range(1200)]
    write(tmp_path / "pope/output/coco/coco_pope_random.json", "\n".join(lines))
    (fault,) = missing("pope", tmp_path / "pope", "random")
    assert fault.startswith("1,200 of 1,200 pictures are missing: ") and fault.endswith("2.jpg and 1,197 more")


def test_a_file_that_is_not_the_published_one_is_said(tmp_path, monkeypatch):
    textvqa(tmp_path)
    first, second = TASKS["textvqa"].check(tmp_path, "val")
    assert first == "not as published: split 'val' has 2 questions, published are 5,000"
    assert second.startswith(f"not as published: the SHA-256 of {tmp_path}/TextVQA_0.5.1_val.json is ")
    assert second.endswith("published is 4ceb5aadc1a4…")
    assert "TextVQA_Rosetta_OCR_v0.2_val.json" in TASKS["textvqa_ocr"].check(tmp_path, "val")[-1]
    pope(tmp_path)
    path = tmp_path / "output/coco/coco_pope_popular.json"
    path.write_text(path.read_text() * 2)
    assert TASKS["pope"].check(tmp_path, "popular")[1] == (
        "not as published: 2 questions stand there several times, such as popular-1"
    )
    mme(tmp_path)
    assert TASKS["mme"].check(tmp_path, "test")[1].startswith("not as published: no category existence, count, ")


# What becomes of a value: every value of every file is replaced by each of these in turn.
OTHERS = (None, True, -7, 1e400, "", "\x00/..", [None], {})


def places(value, path=()):
    """Paths to every value inside a JSON value, of lists to the first two."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def replaced(value, path, other):
    """A copy of a JSON value with another at a path; without it if that is `places`."""
    whole = copy.deepcopy(value)
    if not path:
        return other
    at = whole
    for key in path[:-1]:
        at = at[key]
    if other is places:
        del at[path[-1]]
    else:
        at[path[-1]] = other
    return whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_damaged_files_are_refused_by_name_and_place_or_do_not_matter(name, tmp_path):
    LAYOUTS[name][0](tmp_path)
    task, refused = TASKS[name], 0
    for file in [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".txt", ".csv")]:
        whole = file.read_text()
        for damaged in damages(file, whole):
            file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
            try:
                found = list(task.examples(tmp_path, task.SPLIT))
            except (ValueError, FileNotFoundError) as error:
                assert file.name in str(error), (damaged, error)
                assert "\n" not in str(error) and len(str(error)) < 400 + 2 * len(str(file)), error
                refused += 1
            else:
                for example in found:
                    assert isinstance(example.question, str) and example.question.strip(), damaged
                    assert all(isinstance(answer, str) for answer in example.answers) and example.answers, damaged
                    assert isinstance(example.id, str | int) and isinstance(example.kind, str), damaged
        file.write_text(whole)
        if file.name != "1000.png.json":
            file.unlink()
            try:
                list(task.examples(tmp_path, task.SPLIT))
            except FileNotFoundError as error:
                assert file.name in str(error) or file.suffix == ".txt"
        file.write_text(whole)
    assert refused > 10


def damages(file, whole):
    yield from (
        b"",
        b"\xff\xfe{}",
        b"<html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    yield from (b"[" * 100_000, b"{}", b"[]", b"[1]", b"null", whole[: len(whole) // 2], whole.rstrip()[:-1])
    yield b"\xef\xbb\xbf" + whole.encode()  # a byte order mark does not matter
    lines = file.name.startswith("coco_pope")
    if file.suffix == ".json":
        content = [json.loads(line) for line in whole.splitlines()] if lines else json.loads(whole)
        for path in places(content):
            for other in (*OTHERS, places):
                if path or other is not places:
                    new = replaced(content, path, other)
                    yield "\n".join(map(json.dumps, new)) if lines and isinstance(new, list) else json.dumps(new)
    elif file.suffix == ".txt":
        one, two = whole.splitlines()
        for row in ("no tab Yes", "Is it?\tMaybe", "\tYes", "Is it?\t", "a\tb\tc"):
            yield from (f"{one}\n{row}\n", f"{row}\n{two}\n")
        yield from (one, f"{whole}\n{one}", f"\n\n{one}\r\n{two}\r\n\n")


MALFORMED = r"""
pope     coco_pope_random.json           {"question_id": 1,     |, line 1: no JSON (it ends in the middle)
pope     coco_pope_random.json           \n{"image": 3}         |, line 2, field 'image': expected text, found 3
gqa      testdev_balanced_questions.json {\n"1": {},\n"2" 5}    |, line 3: no JSON (Expecting ':' delimiter, column 5)
gqa      testdev_balanced_questions.json {"1": {}}              |: question 1 has no field 'imageId'; it has none
docvqa   val_v1.0_withQT.json            {"data": [3]}          |: data[0]: expected an object, found 3
textvqa  TextVQA_0.5.1_val.json          {"data": {}}           |, field 'data': expected a list, found {}
chartqa  test_human.json                 [[]]                   |: [0]: expected an object, found []
mme      0001.txt                        A?\tYes\nIs?\tPerhaps  |, line 2, field 'answer': expected yes or no, found
"""


@pytest.mark.parametrize("case", MALFORMED.strip().splitlines())
def test_a_malformed_question_is_named_by_file_and_line_or_item(case, tmp_path):
    case, _, sentence = case.partition("|")
    name, file, text = case.split(maxsplit=2)
    LAYOUTS[name][0](tmp_path)
    (path,) = tmp_path.rglob(file)
    path.write_text(text.rstrip().replace(r"\n", "\n").replace(r"\t", "\t"))
    assert TASKS[name].check(tmp_path, TASKS[name].SPLIT)[0].startswith(f"{path}{sentence}")


def test_a_folder_of_something_else_is_refused_in_a_sentence(tmp_path):
    for name in LAYOUTS:
        (fault,) = TASKS[name].check(tmp_path, TASKS[name].SPLIT)
        assert fault.startswith(f"{tmp_path} has no") and "`--describe` says where" in fault


def test_questions_without_answers_are_named(tmp_path):
    vqav2(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"annotations": whole["annotations"][:1]}))
    assert (
        "question 262148001 has no answers in v2_mscoco_val2014_annotations.json"
        in TASKS["vqav2"].check(tmp_path, "val")[0]
    )
    textvqa(tmp_path)
    write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": []})
    assert "has no OCR tokens of picture 003a8ae2ef43b901" in TASKS["textvqa_ocr"].check(tmp_path, "val")[0]
