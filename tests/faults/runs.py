"""The run of most trials: it goes on from a copy of `small_run`, saves after each step, and keeps two."""

from tests.conftest import ENCODERS, ROOT, TINY

LAST = 90  # step at which it would end
OVERRIDES = (f"train.steps={LAST}", "train.save_every=1", "train.keep=2", "train.log_every=1", "mesh.data=1")


def words(tiny_args, workdir, *overrides):
    """Arguments of `lmm`, with further overrides of the config."""
    return ("train", *tiny_args, *(f"--config.{o}" for o in (*OVERRIDES, *overrides)), "--workdir", workdir)


def of_recipe(recipe, folder, *overrides):
    """Arguments of `lmm train` for a recipe of the digits config, or another config, at test size.

    Args:
      recipe: as for the fixture `tiny`.
      folder: of the prepared digits.
      overrides: of the config.
    """
    name, arg = (recipe, "") if recipe in ENCODERS else ("digits", f"recipe={recipe},")
    config = f"{ROOT}/configs/{name}.py:{arg}data={folder}"
    return ("train", "--config", config, *(f"--config.{o}" for o in (*ENCODERS[name], *TINY, *overrides)))


class Run:
    """`lmm train` as a process that notes the states that it hands over to be saved, see `noted`."""

    def __init__(self, server, notes, command, plain=False, **variables):
        """Starts it: `notes` is the file for its notes, which later runs of the same workdir go on with."""
        self._notes = notes
        self.process = server.start(notes, *command, module="tests.faults.noted", plain=plain, **variables)

    def noted(self) -> dict[int, str]:
        """Hash of the state by step."""
        lines = self._notes.read_text().splitlines() if self._notes.exists() else ()
        return {int(step): state for step, state in map(str.split, lines)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.end()
