"""What every command leans on: files that are written whole or not at all."""
import os

import pytest

from lib.common import replacing, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "note.txt"
    for text in ("first", "second \ud83d"):                     # half a surrogate pair, as a model may produce it
        assert write_whole(path, text) == path
    assert path.read_text() == "second \\ud83d" and os.listdir(path.parent) == ["note.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("a", "b"):
        with replacing(tmp_path / "model") as part:
            (part / "sub").mkdir(parents=True)
            (part / "sub" / name).write_text(name)
            assert not (tmp_path / "model" / "sub" / name).exists()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model" / "sub") == ["b"]


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_after_a_failure_the_old_content_is_there_and_nothing_else(failure, tmp_path):
    write_whole(tmp_path / "note.txt", "old")
    with pytest.raises(type(failure)):
        with replacing(tmp_path / "note.txt") as part:
            part.write_text("half of the n")
            raise failure
    assert os.listdir(tmp_path) == ["note.txt"] and (tmp_path / "note.txt").read_text() == "old"


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".writing_model" / "sub").mkdir(parents=True)
    with replacing(tmp_path / "model") as part:
        part.mkdir()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == []
