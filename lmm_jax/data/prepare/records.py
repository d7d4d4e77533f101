"""The form in which every data set is stored: ArrayRecord files, which TFDS reads too, written without TensorFlow.

TFDS's generator builders sort examples by key; what exceeds a gigabyte they sort on disk, which needs TensorFlow.
Here examples are stored as they come, in source order, with nothing kept in memory, and to the byte alike on every
run.

The description that TFDS wants (`features.json`, `dataset_info.json`) is written beside them. It decides nothing when
records are read: `features.json` names Python classes, which TFDS would import, so that a folder from somewhere else
could run code. What records are made of is `FEATURES`, and where they lie follows from the names of the data set and
of the split.
"""

import os
import re

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from lmm_jax import strict_json

VERSION = "1.0.0"
ROWS_PER_SHARD = 16_384
FILES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"  # names of a split's files, in TFDS's words
DESCRIPTION = ("features.json", "dataset_info.json")
BUILDER = re.compile(r"[A-Za-z]\w{0,99}/\d{1,4}\.\d{1,4}\.\d{1,4}")  # where `write_records` puts them

FEATURES = {
    "id": tfds.features.Text(),
    "images": tfds.features.Sequence(tfds.features.Text()),  # encoded, as they were
    "turns": tfds.features.Sequence(
        {
            "role": tfds.features.Text(),
            "text": tfds.features.Text(),
            "kind": tfds.features.Text(),  # of question, to evaluate by; empty in general
            "in_loss": tfds.features.Scalar(np.bool_),  # whether an answer is trained on; true where it is not said
        }
    ),
}
_TFDS = "tensorflow_datasets.core.features"
# What `features.json` says of them, by the way to each; the members of a sequence are `*`.
KINDS = {
    "": f"{_TFDS}.features_dict.FeaturesDict",
    "id": f"{_TFDS}.text_feature.Text",
    "images": f"{_TFDS}.sequence_feature.Sequence",
    "images/*": f"{_TFDS}.text_feature.Text",
    "turns": f"{_TFDS}.sequence_feature.Sequence",
    "turns/*": f"{_TFDS}.features_dict.FeaturesDict",
    **{f"turns/*/{key}": f"{_TFDS}.text_feature.Text" for key in ("role", "text", "kind")},
    "turns/*/in_loss": f"{_TFDS}.scalar.Scalar",
}
LATER = "turns/*/in_loss"  # which folders of earlier versions lack


def write_records(folder, name, splits, rows) -> str:
    """Writes records in order.

    Args:
      folder: that holds nothing of `name` yet.
      name: of the data set, a Python identifier.
      splits: their names, each of which gets a record at least.
      rows: iterable of `(split, record)`, each with the `FEATURES`, in memory one at a time.

    Returns:
      where `Records` and `tfds.builder_from_directory` find them, relative to `folder`.
    """
    path = epath.Path(folder) / name / VERSION
    path.mkdir(parents=True)
    features = tfds.features.FeaturesDict(FEATURES)
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    files = {split: _Files(path / f"{name}-{split}.array_record") for split in splits}
    for split, record in rows:
        example = serializer.get_tf_example(features.encode_example(_complete(record)))
        files[split].add(example.SerializeToString(deterministic=True))  # else its keys have any order
    for written in files.values():
        written.close()
    _describe(path, name, features, files)
    return f"{name}/{VERSION}"


def _describe(path, name, features, files):
    """Writes what TFDS reads beside the records."""
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(path), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    info.set_file_format(file_format="array_record", override=False)
    splits = []
    for split, written in files.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=name, data_dir=path, split=split, filetype_suffix="array_record", template=FILES
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=written.lengths,
                num_bytes=written.bytes,
                filename_template=template,
            )
        )
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(path)


class _Files:
    """The numbered files of a split, filled one after the other.

    Attributes:
      lengths: records in each.
      bytes: of all records.
    """

    def __init__(self, path):
        self.lengths, self.bytes, self._path, self._writer = [], 0, path, None

    def add(self, data):
        """Writes the next record."""
        if self._writer is None:
            file = self._path.parent / f"{self._path.name}-{len(self.lengths):05d}"
            self._writer = ArrayRecordWriter(os.fspath(file), "group_size:1")  # each record is read by itself
            self.lengths.append(0)
        self._writer.write(data)
        self.lengths[-1] += 1
        self.bytes += len(data)
        if self.lengths[-1] == ROWS_PER_SHARD:
            self.close()

    def close(self):
        """Makes sure that all of it is written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _complete(record):
    """A record with what its turns leave unsaid."""
    return record | {"turns": [{"in_loss": True, **turn} for turn in record["turns"]]}


class Records:
    """The records of a split, read by their number; nothing that stands in their folder is imported or run.

    Attributes:
      files: the ArrayRecord files, in order.
    """

    def __init__(self, folder, builder, split):
        """Opens them.

        Args:
          folder: as `write_records` took it, of this machine.
          builder: what it returned.
          split: name of one.

        Raises:
          ValueError: what is missing or damaged, named; or a path that leads out of the folder.
        """
        folder = epath.Path(folder)
        if not BUILDER.fullmatch(builder):
            raise ValueError(f"{folder} holds no {strict_json.shown(builder)}: NAME/VERSION is expected")
        path, name = folder / builder, builder.partition("/")[0]
        self.files = find_files(path, name, split)
        for file in [*self.files, *(path / name for name in DESCRIPTION)]:
            check_inside(folder, file)
        self._features = tfds.features.FeaturesDict(_stored_features(path))
        _check_info(path, name, split)
        try:
            self._source = ArrayRecordDataSource([os.fspath(file) for file in self.files])
        except Exception as error:  # ArrayRecord raises many kinds; each means that a file is none of its own
            raise ValueError(f"a file of {path} is no ArrayRecord file: {_first_line(error)}") from error

    def __len__(self):
        return len(self._source)

    def __getitem__(self, record):
        return self._features.deserialize_example_np(self._source[record])


def find_files(path, name, split):
    """The ArrayRecord files of a split, in order.

    Raises:
      ValueError: there are none, or one is missing between others.
    """
    files = sorted(path.glob(f"{name}-{split}.array_record-*"))
    wanted = [f"{name}-{split}.array_record-{n:05d}" for n in range(len(files))]
    if not files or [file.name for file in files] != wanted:
        missing = sorted(set(wanted) - {file.name for file in files}) or [f"{name}-{split}.array_record-00000"]
        raise ValueError(f"{path / missing[0]} is missing")
    return files


def check_inside(folder, file):
    """Raises ValueError for a file that is none, is empty, or does not lie in `folder` once links are followed."""
    if not os.path.isfile(file):
        raise ValueError(f"{file} is {'no file' if os.path.exists(file) else 'missing'}")
    if not os.path.getsize(file):
        raise ValueError(f"{file} is empty")
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(file)]) != root:
        raise ValueError(f"{file} is a link that leads out of {folder}")


def _stored_features(path) -> dict:
    """`FEATURES`, or what of them earlier versions stored; ValueError if `features.json` describes anything else."""
    file = path / DESCRIPTION[0]
    found = _kinds(strict_json.read_object(file), "")
    if found == KINDS:
        return FEATURES
    if found == {where: kind for where, kind in KINDS.items() if where != LATER}:
        turn = dict(FEATURES["turns"].feature.items())
        return FEATURES | {"turns": tfds.features.Sequence({key: turn[key] for key in turn if key != "in_loss"})}
    where = next(where for where in {**KINDS, **found} if KINDS.get(where) != found.get(where))
    raise ValueError(
        f"{file} describes other records than `lmm prepare` writes: {where or 'the whole'} is "
        f"{strict_json.shown(found.get(where))}, {strict_json.shown(KINDS.get(where))} is expected; nothing of it "
        "was used"
    )


def _kinds(node, where) -> dict:
    """What `features.json` says that each feature is, by the way to it as in `KINDS`."""
    if not isinstance(node, dict):
        return {where: node}
    out, of_dict, sequence = {where: node.get("pythonClassName")}, node.get("featuresDict"), node.get("sequence")
    members = of_dict.get("features") if isinstance(of_dict, dict) else None
    for key, inner in members.items() if isinstance(members, dict) else ():
        out |= _kinds(inner, f"{where}/{key}".lstrip("/"))
    if isinstance(sequence, dict):
        out |= _kinds(sequence.get("feature"), f"{where}/*")
    return out


def _check_info(path, name, split):
    """Raises ValueError if `dataset_info.json` is damaged, or of other records than those of the split."""
    file = path / DESCRIPTION[1]
    info = strict_json.read_object(file)
    said = {"name": name, "version": path.name, "fileFormat": "array_record"}
    wrong = next((f"{key} is {strict_json.shown(info.get(key))}" for key in said if info.get(key) != said[key]), "")
    splits = info.get("splits")
    named = [x for x in splits if isinstance(x, dict)] if isinstance(splits, list) else []
    of_split = [x for x in named if x.get("name") == split]
    if len(of_split) != 1:
        wrong = wrong or f"it names the split {split!r} {len(of_split)} times"
    elif of_split[0].get("filepathTemplate") != FILES:
        wrong = wrong or f"filepathTemplate is {strict_json.shown(of_split[0].get('filepathTemplate'))}"
    if wrong:
        raise ValueError(f"{file} is not what `lmm prepare` writes: {wrong}")


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
