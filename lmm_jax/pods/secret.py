"""What only the hosts of a run know: a variable, or for as long as they meet a file where only they look."""

import contextlib
import os
import re
import secrets

from etils import epath

VARIABLE = "LMM_HOSTS_SECRET"
SHORTEST = 16  # characters


def from_environment() -> bytes | None:
    """What the variable LMM_HOSTS_SECRET says, None if it is not set; ValueError if it is too short to be one."""
    secret = os.environ.get(VARIABLE, "")
    if secret and len(secret) < SHORTEST:
        raise ValueError(f"{VARIABLE} has {len(secret)} characters: expected {SHORTEST} or more, alike on all hosts")
    return secret.encode() or None


class SecretFile:
    """A file that host 0 writes to a folder of the run, for its owner only, and removes once all hosts have come.

    Whoever may read that folder can join the run: on a bucket who may read the bucket, elsewhere who runs it.
    """

    def __init__(self, folder, port):
        """`folder` is one that all hosts see; `port`, which they know, tells runs apart that begin there together."""
        self.path = epath.Path(folder) / f".hosts_{port}"
        self._made = []  # folders, the lowest first

    def write(self) -> bytes:
        """Makes a new secret and writes it; raises OSError."""
        secret, local = secrets.token_hex(32), "://" not in str(self.path)
        try:
            for folder in self.path.parents if local else ():
                if folder.exists():
                    break
                self._made.append(folder)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if local:
                new = f"{self.path}.new"
                with contextlib.suppress(FileNotFoundError):
                    os.remove(new)
                with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                    f.write(secret)
                os.replace(new, self.path)
            else:
                self.path.write_text(secret)
        except OSError as e:
            raise OSError(
                f"{self.path}: the secret by which the hosts know one another cannot be written here ({e}); choose "
                f"another folder, or set {VARIABLE} to the same text on all hosts"
            ) from e
        return secret.encode()

    def read(self) -> bytes | None:
        """The secret; None while there is none."""
        try:
            text = self.path.read_text()
        except Exception:  # of the kind that this bucket has, and it may be there when one looks again
            return None
        return text.encode() if re.fullmatch("[0-9a-f]{64}", text) else None

    def remove(self):
        """Leaves the folder as it was."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            for folder in self._made:
                os.rmdir(folder)  # which fails where something else came meanwhile
