"""What an error says to whoever ran the command: a sentence where they can act on it, else it is a fault of ours.

Ours are sentences already: a ValueError, OSError or ImportError that a `raise` of this package made. What files,
disks, memory and networks do to a library arrives as an error of that library, often wrapped in several others; it is
told by its cause. Everything else is a fault of lmm_jax.
"""

import errno
import linecache
import os
import traceback

PACKAGE = os.path.dirname(__file__)

# What a system call said, as a sentence about {path}, and the exit code: 2 where another command is needed, 1 where
# the same one may do later.
OF_SYSTEM = {
    errno.ENOENT: ("there is no {path}", 2),
    errno.EACCES: ("no permission to use {path}; choose another place, or change its permissions", 2),
    errno.EPERM: ("no permission to use {path}; choose another place, or change its permissions", 2),
    errno.EROFS: ("{path} lies on a disk that cannot be written to; choose another place", 2),
    errno.EISDIR: ("{path} is a folder, where a file is expected", 2),
    errno.ENOTDIR: ("{path} leads through a file, where a folder is expected", 2),
    errno.EEXIST: ("{path} is there already; choose another name", 2),
    errno.ENOTEMPTY: ("{path} is not empty; choose another folder", 2),
    errno.ENAMETOOLONG: ("{path} is too long a name", 2),
    errno.ELOOP: ("{path} is a link that leads in a circle", 2),
    errno.EINVAL: ("{path} cannot be used: the system calls it invalid", 2),
    errno.ENOSPC: ("the disk is full, at {path}; make room, then start the same command again", 1),
    errno.EDQUOT: ("the disk quota is used up, at {path}; make room, then start the same command again", 1),
    errno.EFBIG: ("{path} is larger than its disk allows", 1),
    errno.EIO: ("the disk failed at {path}; look at the system's log, then start the same command again", 1),
    errno.ESTALE: ("{path} is on a network disk that is gone; start the same command again", 1),
    errno.EMFILE: ("too many files are open, at {path}; raise the limit (ulimit -n)", 1),
    errno.ENFILE: ("too many files are open on this machine, at {path}", 1),
    errno.ENOMEM: ("this machine is out of memory; see `lmm show params` for what the model takes", 1),
    errno.EADDRINUSE: ("the network address is in use by another process", 1),
    errno.ECONNREFUSED: ("a server refused the connection; is it running, and is its address right?", 1),
    errno.ECONNRESET: ("a server ended the connection; start the same command again", 1),
    errno.ETIMEDOUT: ("a server did not answer in time; start the same command again", 1),
    errno.ENETUNREACH: ("the network cannot be reached", 1),
    errno.EHOSTUNREACH: ("a server cannot be reached", 1),
}
# Words by which libraries that are not written in Python report the same.
WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "Too many open files": errno.EMFILE,
    "Input/output error": errno.EIO,
    "Cannot allocate memory": errno.ENOMEM,
    "Connection refused": errno.ECONNREFUSED,
    "Connection reset": errno.ECONNRESET,
}
# Of these, and of servers, what keeps a place from being reached for now: it says nothing of what lies there.
AWAY = {
    *(errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT),
    *(errno.ENETUNREACH, errno.EHOSTUNREACH),
}
AWAY_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CURL error", *(w for w, number in WORDS.items() if number in AWAY))
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
NETWORK = ("gcsfs", "aiohttp", "google", "requests", "urllib3", "botocore")  # libraries whose errors are of servers

REPORT = (
    "lmm: this is a fault of lmm_jax, not of your input. Please report it on the project's issue tracker, with the "
    "command, the lines above, and what `pip list` says of jax, flax, orbax-checkpoint and grain."
)


def explain(error) -> tuple[str, int] | None:
    """A sentence about an error and the exit code that goes with it; None if it is a fault of ours."""
    if is_ours(error):
        return str(error), 1 if getattr(error, "may_pass", False) else 2
    chain = chain_of(error)
    for one in chain:
        if isinstance(one, ImportError) and "gcsfs" in str(one):
            return "gs:// needs gcsfs: pip install 'lmm_jax[gcs]'", 2
        if isinstance(one, ArithmeticError) and _raised_by_us(one):
            return str(one), 1
        if _of_network(one):
            return _of_server(one)
        if isinstance(one, OSError) and one.errno is not None:
            return _of_system(one.errno, _path(one), one)
        if isinstance(one, MemoryError):
            return OF_SYSTEM[errno.ENOMEM]
    for one in chain:
        for words, number in WORDS.items():
            if words in str(one):
                return _of_system(number, _first_line(one), one)
        if any(words in str(one) for words in OUT_OF_MEMORY):
            return (
                f"out of memory: {_first_line(one)}. Set a smaller train.batch_size, more devices (mesh.fsdp), "
                "model.decoder.remat=full or offload, or a smaller model; `lmm compile` says what fits where",
                1,
            )
    return None


def may_pass(error) -> bool:
    """Whether the same may succeed later: memory, a network, a disk that is full or gone."""
    told = explain(error)
    return told is not None and told[1] == 1


def is_away(error) -> bool:
    """Whether a place cannot be reached for now, which says nothing of what lies there."""
    return any(
        _of_network(one)
        or (isinstance(one, OSError) and one.errno in AWAY)
        or any(words in str(one) for words in AWAY_WORDS)
        for one in chain_of(error)
    )


def is_ours(error) -> bool:
    """Whether a `raise` of this package made the error, as a sentence for the user; an error's number is none."""
    numbered = isinstance(error, OSError) and error.errno is not None
    return isinstance(error, ValueError | OSError | ImportError) and not numbered and _raised_by_us(error)


def _raised_by_us(error):
    """Whether the last frame of an error's traceback is a `raise` statement in this package."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    file = frame.f_code.co_filename
    return file.startswith(PACKAGE) and linecache.getline(file, line).strip().startswith("raise ")


def chain_of(error) -> list[BaseException]:
    """An error and what caused it, the error first."""
    out = []
    while error is not None and error not in out:
        out.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return out


def _of_network(error):
    return type(error).__module__.split(".")[0] in NETWORK


def _of_server(error):
    return (
        f"a server could not be used: {type(error).__name__}: {_first_line(error)}. For gs:// it takes a network and "
        "the right to use the bucket: gcloud auth application-default login",
        1,
    )


def _of_system(number, path, error):
    sentence, code = OF_SYSTEM.get(number, (f"{{path}}: {getattr(error, 'strerror', None) or _first_line(error)}", 1))
    return sentence.format(path=path), code


def _path(error):
    names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in _names(error)]
    return " → ".join(names) or f"a file ({_first_line(error)})"


def _names(error):
    return [name for name in (error.filename, error.filename2) if name is not None]


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
