"""Signatures: only what the key's owner signed verifies, whoever changed what; OpenSSL's keys are taken."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.store.artifact import open_artifact
from qdeploy.store.manifest import MANIFEST, SIGNATURE
from qdeploy.store.sign import sign, verify
from qdeploy.store.signature import REQUIRED, signature_required
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.helpers import reseal, small_artifact, small_draft


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A signed artifact, its keys beside it."""
    made = small_artifact(tmp_path / "made")
    sign(made, tmp_path / "key", new_key=True)
    return made.path


def test_a_signed_artifact_verifies_and_keeps_its_identity(signed: Path) -> None:
    found = verify(signed, [signed.parent / "key.pub"])
    assert found.sha256 == open_artifact(signed).sha256
    assert found.key == signed.parent / "key.pub"
    assert (signed.parent / "key").stat().st_mode & 0o077 == 0


def damage(path: Path) -> None:
    (path / "config.json").write_text("{}")


def edit_signature(path: Path, **changes: str) -> None:
    content = json.loads((path / SIGNATURE).read_text())
    (path / SIGNATURE).write_text(json.dumps(content | changes))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed file": (damage, "does not match its recorded hash"),
    "a changed file, sealed again": (lambda path: (damage(path), reseal(path)), "changed after it was signed"),
    "another recipe": (lambda path: reseal(path, lambda m: m["recipe"].update(seed=4)), "changed after"),
    "other measurements": (lambda path: reseal(path, lambda m: m["measured"].update(seconds=0.0)), "changed after"),
    "no signature": (lambda path: (path / SIGNATURE).unlink(), "is not signed"),
    "a signature of nothing": (lambda path: edit_signature(path, signature=""), "changed after it was signed"),
    "no base64": (lambda path: edit_signature(path, signature="*"), "is damaged"),
    "another algorithm": (lambda path: edit_signature(path, algorithm="none"), "with another key"),
    "another key": (
        lambda path: edit_signature(path, key=base64.b64encode(bytes(32)).decode()),
        "with another key",
    ),
    "an added entry": (lambda path: edit_signature(path, extra="x"), "is not as it should be"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_changed_is_refused(signed: Path, change: str) -> None:
    make, problem = CHANGES[change]
    make(signed)
    with pytest.raises(InvalidInputError, match=problem):
        verify(signed, [signed.parent / "key.pub"])


def test_a_signature_of_another_artifact_or_by_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = small_artifact(tmp_path / "other", content=2.0)
    shutil.copy(signed / SIGNATURE, other.path)
    with pytest.raises(InvalidInputError, match="of another artifact"):
        verify(other, [tmp_path / "key.pub"])
    sign(other, tmp_path / "mine", new_key=True)
    with pytest.raises(InvalidInputError, match="with another key"):
        verify(other, [tmp_path / "key.pub"])
    assert verify(other, [tmp_path / "key.pub", tmp_path / "mine.pub"]).key == tmp_path / "mine.pub"


def test_required_signatures_hold_for_whatever_is_opened(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = small_artifact(tmp_path / "other", content=2.0).path
    with signature_required([tmp_path / "key.pub"]):
        open_artifact(signed)
        with pytest.raises(InvalidInputError, match="is not signed"):
            open_artifact(other)
        assert small_draft(other).finished()  # one's own, just made
    open_artifact(other)
    monkeypatch.setenv(REQUIRED, str(tmp_path / "key.pub"))
    open_artifact(signed)
    with pytest.raises(InvalidInputError, match="is not signed"):
        open_artifact(other)


def test_the_command_line(signed: Path, tmp_path: Path, qdeploy: Callable[..., Result]) -> None:
    other = small_artifact(tmp_path / "other", content=2.0).path
    for name in ("key", "key.pub"):
        before = (tmp_path / name).read_bytes()
        assert qdeploy("sign", other, "--key", tmp_path / "key", "--new-key").exit_code == 2
        assert (tmp_path / name).read_bytes() == before
    assert qdeploy("verify", other, "--key", tmp_path / "key.pub").exit_code == 5
    assert qdeploy("sign", other, "--key", tmp_path / "key").exit_code == 0
    said = qdeploy("verify", other, "--key", tmp_path / "key.pub", "--json")
    assert json.loads(said.stdout)["sha256"] == json.loads((other / MANIFEST).read_text())["sha256"]
    (other / SIGNATURE).unlink()
    for path, code in ((signed, 0), (other, 5)):
        done = qdeploy("export", path, "-o", tmp_path / "out", "--require-signature", tmp_path / "key.pub")
        assert ("is not signed" in done.stderr) == (code == 5)


def test_keys_of_openssl_are_taken_and_others_refused(signed: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    for words in (
        "genpkey -algorithm ed25519 -out theirs.pem",
        "pkey -in theirs.pem -pubout -out theirs.pub",
        "genpkey -algorithm x25519 -out other.pem",
    ):
        subprocess.run(["openssl", *words.split()], check=True, cwd=tmp_path)
    sign(signed, tmp_path / "theirs.pem")
    verify(signed, [tmp_path / "theirs.pub"])
    for key, problem in (
        ("other.pem", "not an Ed25519"),
        ("theirs.pub", "not a private"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=problem):
            sign(signed, tmp_path / key)
