"""What only the hosts of a run know, and who else can look at it."""

import pytest

from lmm_jax.pods import hosts
from lmm_jax.pods.place import Place
from lmm_jax.pods.secret import SecretFile, from_environment


def test_the_variable_is_long_enough_to_be_a_secret(monkeypatch):
    monkeypatch.delenv("LMM_HOSTS_SECRET", raising=False)
    assert from_environment() is None
    monkeypatch.setenv("LMM_HOSTS_SECRET", "sixteen letters.")
    assert from_environment() == b"sixteen letters."
    monkeypatch.setenv("LMM_HOSTS_SECRET", "fifteen letters")
    with pytest.raises(ValueError, match="LMM_HOSTS_SECRET has 15 characters: expected 16 or more"):
        from_environment()


def test_a_file_is_for_its_owner_and_leaves_the_folder_as_it_was(tmp_path):
    file = SecretFile(tmp_path / "a" / "b", 1234)
    other = SecretFile(tmp_path / "a" / "b", 1234)  # of another host
    assert other.read() is None
    secret = file.write()
    assert len(secret) == 64 and other.read() == secret
    path = tmp_path / "a" / "b" / ".hosts_1234"
    assert path.stat().st_mode & 0o777 == 0o600
    assert SecretFile(tmp_path / "a" / "b", 1236).read() is None  # a run that begins there, too
    path.write_bytes(secret[:-1])
    assert other.read() is None  # half written, or no secret
    path.write_bytes(b"\xff" * 64)
    assert other.read() is None
    assert file.write() != secret  # one that was left by a run that was killed is no longer good
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_keeps_it(tmp_path):
    file = SecretFile(tmp_path / "a", 1234)
    file.write()
    (tmp_path / "a" / "config.json").write_text("{}")
    file.remove()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]
    file.remove()


def test_a_folder_that_cannot_be_written_to_is_named_with_what_to_do(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError, match=r"a/\.hosts_1234: the secret .* cannot be written here .* LMM_HOSTS_SECRET"):
        SecretFile(tmp_path / "a", 1234).write()


def test_without_a_secret_and_a_folder_nobody_is_let_in(monkeypatch):
    monkeypatch.delenv("LMM_HOSTS_SECRET", raising=False)
    monkeypatch.setattr(hosts, "find_place", lambda: Place("localhost:1", 4, 0))
    with pytest.raises(ValueError, match="set LMM_HOSTS_SECRET to the same text of 16 characters or more on all 4"):
        hosts.start()
