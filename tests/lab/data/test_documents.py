"""What files give, and what is said about those that cannot be used."""

from __future__ import annotations

import gzip
import json

import pytest

from lab.data.documents import DataError, Document, Turn, digest, document, question, read, site
from lab.data.named import articles, documents


@pytest.fixture
def file(tmp_path):
    """file(name, content) -> path; objects become JSON lines."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content)) + "\n"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_half_a_character_is_refused_with_its_place(file):
    with pytest.raises(DataError, match=r"a.jsonl:2: text holds half a character \(\\ud83d\) at 1"):
        read(file("a.jsonl", '{"text": "whole"}\n{"text": "a\\ud83d"}\n'))


def test_suffixes_are_read_in_any_case(file):
    assert [each.text for each in read(file("a.JSONL", '{"text": "one"}\n'))] == ["one"]


def test_plain_text_is_one_document(file):
    assert read(file("a.txt", "\ufeffone\n\ntwo\r\n")) == [Document("a.txt", text="one\n\ntwo\r\n")]


def test_the_three_kinds_of_records(file):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = file(
        "a.jsonl",
        [
            {"text": "one", "url": "https://www.shop.example.com/x"},
            {"prompt": "2+2=", "completion": "4", "id": 7},
            {"messages": chat},
        ],
    )
    text, task, talk = read(path)
    assert text == Document("a.jsonl:1", "example.com", "one")
    assert task == Document("7", text="2+2=", completion="4")
    assert talk == Document("a.jsonl:3", turns=(Turn("user", "hi"), Turn("assistant", "ho")))


def test_a_folder_is_all_of_its_files_in_order(file, tmp_path):
    file("d/b.txt", "second")
    file("d/a.jsonl", [{"text": "first"}])
    file("d/deep/c.jsonl.gz", gzip.compress(b'{"text": "third"}\n'))
    file("d/README", "not data")
    assert [each.text for each in read(tmp_path / "d")] == ["first", "second", "third"]


def test_a_line_separator_inside_a_text_ends_no_record(file):
    """str.splitlines would cut the JSON in two at U+2028."""
    (document,) = read(file("a.jsonl", '{"text": "one\u2028two"}\n'.encode()))
    assert document.text == "one\u2028two"


BAD = {
    "empty text": ("a.txt", b" \n ", r"a\.txt is empty"),
    "empty lines": ("a.jsonl", b"\n\n", r"a\.jsonl is empty"),
    "empty texts": ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl is empty"),
    "not UTF-8": ("a.txt", b"good \xe9t\xe9", r"not UTF-8: byte 5 is 0xe9"),
    "not UTF-8 in JSON": ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', r"byte 25 is 0xff"),
    "half JSON": (
        "a.jsonl",
        b'{"text": "ok"}\n{"text": "cut of',
        r"line 2 is not JSON .*each line must be one JSON object",
    ),
    "half JSON after blanks": ("a.jsonl", b'\n\n{"text": ', r"line 3 is not JSON"),
    "a list": ("a.jsonl", b'["text"]\n', r"line 1 is list"),
    "too deep": ("a.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
    "no field": ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1 has none of the fields text.*its fields: body"),
    "text is null": ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: text is NoneType, not a text"),
    "no completion": ("a.jsonl", b'{"prompt": "x"}\n', r"a\.jsonl:1: completion is missing"),
    "no turns": ("a.jsonl", b'{"messages": []}\n', r"messages must be a list of at least one"),
    "odd turn": ("a.jsonl", b'{"messages": ["hi"]}\n', r"messages\[0\] must be an object"),
    "no role": ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', r"role is missing"),
    "nobody answers": ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', r"no turn of the assistant"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}')[:-4], r"not a whole gzip file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_and_where(file, name, content, message):
    with pytest.raises(DataError, match=message):
        read(file(name, content))


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        read(tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data; it takes files ending in"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match="neither a file, nor a folder, nor one of the data sets c4"):
        documents("c5")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://www.example.com/x?y", "example.com"),
        ("http://EXAMPLE.com.:80/", "example.com"),
        ("example.org/page", "example.org"),
        ("//a.b.co.uk", "co.uk"),
        ("http://[broken", "http://[broken"),
    ],
)
def test_the_site_of_an_address(url, expected):
    assert site(url) == expected


def test_the_digest_is_that_of_contents_in_order():
    one, two = Document("1", "x", "a"), Document("2", "y", "b")
    assert digest([one, two]) == digest([Document("9", "z", "a"), two])
    assert digest([one, two]) != digest([two, one])
    assert digest([Document("1", "x", "a", "b")]) != digest([one, two])


def test_articles_go_from_heading_to_heading():
    text = " \n = One = \n \n text . \n = = Part = = \n more . \n = Two = \n end \n"
    found = list(articles(text, "w"))
    assert [each.text.strip().split("\n")[0].strip() for each in found] == ["= One =", "= Two ="]
    assert "".join(each.text for each in found) == text.removeprefix(" \n")
    assert [each.id for each in found] == ["w#1", "w#2"]


def test_names_are_looked_up_in_the_users_folder(file, tmp_path, monkeypatch):
    file("root/c4/x.jsonl", [{"text": "a page", "url": "http://a.example"}])
    bank = [{"context": "Where is it?", "label": "card_arrival"}]
    file("root/banking77/train.jsonl", bank)
    yes = {"context": "T -- p", "question": "is it", "choices": ["no", "yes"], "answer": 1}
    file("root/boolq/validation.jsonl", [yes])
    assert [each.text for each in documents("c4", tmp_path / "root")] == ["a page"]
    monkeypatch.setenv("PROMPTSTITCH_DATA_ROOT", str(tmp_path / "root"))
    (query,) = documents("banking77")
    assert (query.text, query.completion) == ("Where is it?\nIntent:", " card arrival")
    (passage,) = documents("boolq/validation")
    assert (passage.text, passage.completion) == ("T -- p\nQuestion: is it?\nAnswer:", " yes")


def test_questions_are_whole_and_alone(file, tmp_path):
    """As the local files ask them, and as the Hub's do; half a sentence to be gone on with is none."""
    stems = [{"question": "what swims?"}, {"question_stem": "Fish live in"}, {"question_stem": "Who flies?"}]
    file("openbookqa/train.jsonl", stems)
    file("boolq/train.jsonl", [{"context": "T -- p", "question": "is it"}, {"passage": "p", "question": "can it"}])
    file("banking77/train.jsonl", [{"context": "Where is it?", "label": "card_arrival"}])
    file("piqa/train.jsonl", [{"goal": "How do I sew?"}, {"goal": "To sew,"}, {"other": 1}])
    asked = {name: documents(f"{name}/questions", tmp_path) for name in ("openbookqa", "boolq", "banking77")}
    texts = {name: [each.text for each in found] for name, found in asked.items()}
    assert texts == {
        "openbookqa": ["What swims?", "Who flies?"],
        "boolq": ["Is it?", "Can it?"],
        "banking77": ["Where is it?"],
    }
    assert all(each.completion is None for found in asked.values() for each in found)
    with pytest.raises(DataError, match="line 3: 'question' is not as in ybisk"):
        documents("piqa/questions", tmp_path)


def test_names_that_are_not_at_hand_come_from_the_hub(file, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "0000.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"passage": "T -- p", "question": "is it", "answer": False}]), path)
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return str(path)

    monkeypatch.setattr("lab.data.named.hf_hub_download", download)
    (passage,) = documents("boolq", tmp_path)
    assert passage.completion == " no"
    repository = {"repo_type": "dataset", "revision": "refs/convert/parquet"}
    assert asked == [("google/boolq", "default/train/0000.parquet", repository)]

    path.write_bytes(b"half")
    with pytest.raises(DataError, match="no whole parquet file"):
        documents("boolq")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"boolq is not at hand .*--data-root"):
        documents("boolq")


def test_questions_need_no_answer(file):
    """`answers` takes what its help promises: a text, a prompt, or a chat that waits for its answer."""
    asked = [{"role": "user", "content": "And then?"}]
    rows = ({"prompt": "Why?"}, {"messages": asked}, {"text": "How?"})
    path = file("q.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read(path, question)
    assert [each.text for each in found] == ["Why?", None, "How?"]
    assert found[1].turns == (Turn("user", "And then?"),)
    for row in ({"prompt": "Why?"}, {"messages": asked}):
        with pytest.raises(DataError):
            document(row, "here")
