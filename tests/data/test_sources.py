import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lightning.data.sources import open_sources, python_stdlib_files


def test_a_glob_reads_every_file_in_sorted_order_byte_for_byte(text_folder: Path) -> None:
    (text_folder / "a" / "crlf.md").write_bytes("\ufeffone\r\ntwo \u00e9".encode())
    corpus = open_sources(str(text_folder / "**" / "*.*"))
    files = sorted(file for file in text_folder.rglob("*.*") if file.is_file())
    assert [document.text for document in corpus] == [file.read_bytes().decode("utf-8-sig") for file in files]
    assert corpus[3].text == list(corpus)[3].text
    assert not corpus.is_chat


def test_json_lines_are_documents_and_blank_lines_are_not(write_rows: Callable[..., Path]) -> None:
    file = write_rows("x.jsonl", [{"body": "one"}, {"body": "two \u00e9"}])
    file.write_text(file.read_text() + "\n \n" + json.dumps({"body": "three"}))
    corpus = open_sources([str(file)], text_field="body")
    assert [document.text for document in corpus] == ["one", "two \u00e9", "three"]
    assert corpus[2].name.endswith("line 5")


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a\\ud800b"}\n')
    assert open_sources(str(file))[0].text == "a?b"


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), file)
    corpus = open_sources(str(file), cache_dir=tmp_path)
    assert [document.text for document in corpus] == ["one", "two"]
    with pytest.raises(ValueError, match=r"--data.text_field.*'body'.*n, text"):
        open_sources(str(file), text_field="body", cache_dir=tmp_path)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken\.parquet as parquet"):
        open_sources(str(broken), cache_dir=tmp_path)


def test_messages_make_a_conversation_and_do_not_mix_with_text(chat_file: Path, text_folder: Path) -> None:
    corpus = open_sources(str(chat_file))
    assert corpus.is_chat
    assert corpus[1].messages is not None
    assert [message["role"] for message in corpus[1].messages] == ["user", "assistant"] * 2
    with pytest.raises(ValueError, match=r"holds conversations and .* holds plain text"):
        open_sources([str(chat_file), str(text_folder / "a" / "*.txt")])


def test_the_standard_library_is_sorted_text_without_tests_and_packages() -> None:
    files = python_stdlib_files()
    assert len(files) > 300
    assert files == python_stdlib_files()
    assert not {"site-packages", "test", "idlelib", "tests"} & {part for file in files for part in file.parts[-3:]}
    assert "json" in {file.parent.name for file in files}


def test_the_topics_of_help_are_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    corpus = open_sources("python-topics")
    assert sorted(document.text for document in corpus) == sorted(pydoc_data.topics.topics.values())
    assert corpus[0].name == f"python-topics {min(pydoc_data.topics.topics)}"
    assert any("English" in document.text or "statement" in document.text for document in corpus)
    files = {file.read_text(encoding="utf-8") for file in python_stdlib_files()}
    assert not any(document.text in files for document in corpus)
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    with pytest.raises(FileNotFoundError, match=r"python-topics: this Python has no topics of help\(\)"):
        open_sources("python-topics")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"body": "x"}', r"--data.text_field: .* no field 'text'; its fields are body"),
        ('{"text": 3}', r"--data.text_field: 'text' of .* is int"),
        ('{"text": "x"', "line 1 is not JSON"),
        ("[1]", "line 1 is a list"),
        ('{"text": "x"}\n{"txt": "x"}', "line 2 has no field 'text'; its fields are txt"),
        ('{"messages": [{"role": "user"}]}', 'needs "messages"'),
        ("", "no document in"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, content: str, error: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=error):
        list(open_sources(str(file)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.txt"):
        open_sources(str(tmp_path / "*.txt"))
    with pytest.raises(FileNotFoundError, match=r"there is no file wikitext.*hub:wikitext"):
        open_sources("wikitext")
    with pytest.raises(IsADirectoryError, match=r"is a folder; name the files"):
        open_sources(str(tmp_path))
    with pytest.raises(ValueError, match=r"--data.sources is empty"):
        open_sources([])
    (tmp_path / "x.txt").write_bytes(b"ab\xff\x00")
    with pytest.raises(ValueError, match=r"x.txt is not UTF-8"):
        list(open_sources(str(tmp_path / "x.txt")))


def test_a_hub_data_set_without_network_is_one_clear_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"hub:some/data:en: the hub data set 'some/data' is not in.*local f"):
        open_sources("hub:some/data:en", hub_split="train[:10]")
    with pytest.raises(ValueError, match="hub:NAME"):
        open_sources("hub:")
