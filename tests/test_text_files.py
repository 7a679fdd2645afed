"""Text files are UTF-8, wherever one is read, and the line where they are not is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from zorl.apps.cli import main
from zorl.apps.judge_prompts import read_prompts
from zorl.apps.page.security import read_users
from zorl.text_files import read_text


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nand\x0ctea\n")
    assert read_text(file) == "café\nand\x0ctea\n"


@pytest.mark.parametrize("read", [read_text, read_users, read_prompts])
def test_another_encoding_is_refused_with_its_line(read, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfada:secret\nand\xe9:tea\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8$"):
        read(file)


def test_the_judges_page_refuses_guidelines_of_another_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"Which is better?\ncaf\xe9\n")
    assert main(["judge", "--run", str(tmp_path / "run"), "--guidelines", str(file), "--no_browser"]) == 2
    assert "a.txt, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8" in capsys.readouterr().err
