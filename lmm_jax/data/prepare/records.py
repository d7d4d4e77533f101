"""The form in which every data set is stored: ArrayRecord files that TFDS reads, written without TensorFlow.

TFDS's generator builders sort examples by key; what exceeds a gigabyte they sort on disk, which needs TensorFlow.
Its `SequentialWriter` stores examples as they come, in source order, with nothing kept in memory.
"""

import itertools

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

VERSION = "1.0.0"
ROWS_PER_SHARD = 16_384

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


def write_records(folder, name, splits, rows) -> str:
    """Writes records in order.

    Args:
      folder: that holds nothing of `name` yet.
      name: of the data set, a Python identifier.
      splits: their names, each of which gets a record at least.
      rows: iterable of `(split, record)`, each with the `FEATURES`, in memory one at a time.

    Returns:
      where `tfds.builder_from_directory` finds them, relative to `folder`.
    """
    path = epath.Path(folder) / name / VERSION
    path.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(path), module_name=__name__
    )
    features = tfds.features.FeaturesDict(FEATURES)
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    writer = tfds.core.SequentialWriter(info, ROWS_PER_SHARD, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, run in itertools.groupby(rows, key=lambda row: row[0]):  # each call writes the description anew
        writer.add_examples({split: (_complete(record) for _, record in run)})
    writer.close_all()
    return info.full_name


def _complete(record):
    """A record with what its turns leave unsaid."""
    return record | {"turns": [{"in_loss": True, **turn} for turn in record["turns"]]}
