"""Who may read the token: files made and refused, and what Ray is told."""

from pathlib import Path

import pytest

from thawline.cluster.errors import TokenError
from thawline.cluster.jobs import token


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the token would lie; no variable of Ray's is set but its path."""
    for name in (token.MODE, token.TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(token.PATH, str(tmp_path / "ray" / "token"))
    return tmp_path / "ray" / "token"


def test_a_new_token_is_long_and_its_owner_s_alone_and_is_never_replaced(file: Path) -> None:
    assert token.create_token() == file
    first = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(first)) == 32
    with pytest.raises(TokenError, match="exists: a cluster that was started with it would refuse another"):
        token.create_token()
    assert file.read_text() == first


def test_a_token_is_asked_for_unless_it_is_said_that_there_is_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    with pytest.raises(TokenError, match=r"does not exist and RAY_AUTH_TOKEN is not set.*thawline token --create"):
        token.use_token()
    token.create_token()
    token.use_token()
    assert (os.environ[token.MODE], os.environ[token.PATH], token.source()) == ("token", str(file), str(file))
    file.unlink()
    monkeypatch.setenv(token.TOKEN, "given")
    token.use_token()
    assert token.source() == "$RAY_AUTH_TOKEN"
    monkeypatch.delenv(token.TOKEN)
    monkeypatch.setenv(token.MODE, "disabled")
    token.use_token()


@pytest.mark.parametrize(("mode", "shown"), [(0o644, "0644"), (0o660, "0660"), (0o604, "0604")])
def test_a_token_that_others_can_read_is_refused(file: Path, mode: int, shown: str) -> None:
    token.create_token().chmod(mode)
    with pytest.raises(TokenError, match=rf"mode {shown}\): whoever reads it can run code .*chmod 600"):
        token.use_token()


def test_an_empty_token_is_refused(file: Path) -> None:
    token.create_token().write_text("\n")
    with pytest.raises(TokenError, match="is empty"):
        token.use_token()


def test_a_cluster_of_one_s_own_has_a_token_that_lies_nowhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    seen = []
    for _ in range(2):
        with token.own_token():
            seen.append(os.environ[token.TOKEN])
        assert token.TOKEN not in os.environ
        assert token.MODE not in os.environ
    assert len(bytes.fromhex(seen[0])) == 32
    assert seen[0] == seen[1]
    assert not file.exists()
    monkeypatch.setenv(token.MODE, "disabled")
    with token.own_token():
        assert token.TOKEN not in os.environ


def test_a_user_without_a_home_is_told_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(token.PATH, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(
        TokenError, match=r"HOME is not set, .* has no name to look it up by: .*; give HOME or RAY_AUTH"
    ):
        token.token_file()
