"""Data sets by name: from a folder of the user's where they are, else files of the Hugging Face Hub, never code.

    c4            web pages with their addresses (validation)
    wikitext2     articles of WikiText-2; parts train and validation
    banking77     bank customers' questions and what they are after; parts train and test
    boolq         a passage, a question and yes or no; parts train and validation
    gsm8k         word problems with worked solutions; parts train and test
    piqa, openbookqa, arc_easy, boolq, gsm8k, banking77: their part questions is what is asked in training data, alone

`name/part` is one part. The tasks among them are written as lm-eval writes them, so that what is learned on a task is
what the harness asks. Knows where data lies; knows no splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from lab.data.documents import DataError, Document, Make, decode, document, read, records

ROOT_VARIABLE = "PROMPTSTITCH_DATA_ROOT"
CONVERTED = "refs/convert/parquet"  # the Hub's own conversion of every public data set

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """One part of a data set: files under the user's folder, and a file on the Hub."""

    local: str  # pattern
    repo: str
    file: str
    make: Callable[[Record, str], Document | None]  # None: a record to pass over
    revision: str = CONVERTED


def _passage(row: Record, where: str) -> Document:
    """BoolQ, with the title before the passage, as SuperGLUE has it."""
    answer = row["choices"][row["answer"]] if "choices" in row else "yes" if row["answer"] else "no"
    asked = f"{row.get('context', row.get('passage'))}\nQuestion: {row['question']}?\nAnswer:"
    return Document(str(row.get("id", where)), text=asked, completion=f" {answer}")


def _intent(row: Record, where: str) -> Document:
    """Banking77: the label as words."""
    label = str(row.get("label_text", row["label"])).replace("_", " ")
    asked = f"{row.get('context', row.get('text'))}\nIntent:"
    return Document(str(row.get("id", where)), text=asked, completion=f" {label}")


def _solved(row: Record, where: str) -> Document:
    """GSM8K: the whole solution, as lm-eval shows it, with its calculator's marks."""
    asked = f"Question: {row['question']}\nAnswer:"
    return Document(str(row.get("id", where)), text=asked, completion=f" {row['answer']}")


def _asked(row: Record, where: str) -> Document | None:
    """A whole question as a person would ask it: the first of the fields that these data sets ask in."""
    names = ("question", "goal", "question_stem", "text", "context")
    text = str(row[next((name for name in names if name in row), names[0])]).strip()
    if "passage" in row or ("context" in row and "question" in row):  # BoolQ has none of its marks
        text = f"{text.removesuffix('?')}?"
    text = text[:1].upper() + text[1:]
    return Document(str(row.get("id", where)), text=text) if text.endswith("?") else None


def _questions(local: str, repo: str, file: str) -> Source:
    return Source(local, repo, file, _asked)


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "c4": Source("c4/*.jsonl", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz", document, "main"),
        "wikitext2/train": Source(
            "wikitext2/wiki.train*.raw", "Salesforce/wikitext", "wikitext-2-raw-v1/train/0000.parquet", document
        ),
        "wikitext2/validation": Source(
            "wikitext2/wiki.valid*.raw", "Salesforce/wikitext", "wikitext-2-raw-v1/validation/0000.parquet", document
        ),
        "banking77/train": Source("banking77/train*.jsonl", "mteb/banking77", "default/train/0000.parquet", _intent),
        "banking77/test": Source("banking77/test*.jsonl", "mteb/banking77", "default/test/0000.parquet", _intent),
        "boolq/train": Source("boolq/train*.jsonl", "google/boolq", "default/train/0000.parquet", _passage),
        "boolq/validation": Source(
            "boolq/validation*.jsonl", "google/boolq", "default/validation/0000.parquet", _passage
        ),
        "gsm8k/train": Source("gsm8k/train*.jsonl", "openai/gsm8k", "main/train/0000.parquet", _solved),
        "gsm8k/test": Source("gsm8k/test*.jsonl", "openai/gsm8k", "main/test/0000.parquet", _solved),
        "boolq/questions": _questions("boolq/train*.jsonl", "google/boolq", "default/train/0000.parquet"),
        "banking77/questions": _questions("banking77/train*.jsonl", "mteb/banking77", "default/train/0000.parquet"),
        "piqa/questions": _questions("piqa/train*.jsonl", "ybisk/piqa", "plain_text/train/0000.parquet"),
        "openbookqa/questions": _questions("openbookqa/train*.jsonl", "allenai/openbookqa", "main/train/0000.parquet"),
        "arc_easy/questions": _questions("arc_easy/train*.jsonl", "allenai/ai2_arc", "ARC-Easy/train/0000.parquet"),
        "gsm8k/questions": _questions("gsm8k/train*.jsonl", "openai/gsm8k", "main/train/0000.parquet"),
    }
)
ALIASES = MappingProxyType(
    {
        "wikitext2": "wikitext2/validation",
        "banking77": "banking77/train",
        "boolq": "boolq/train",
        "gsm8k": "gsm8k/train",
    }
)


def documents(name: str, root: Path | None = None, make: Make = document) -> list[Document]:
    """The documents of a file, a folder or a name. `root` is the folder that names are looked up in first, else the
    one in the environment; `make` reads a record of a file. Raises DataError."""
    path = Path(name).expanduser()
    if path.exists():
        return read(path, make)
    source = SOURCES.get(ALIASES.get(name, name))
    if source is None:
        known = ", ".join([*SOURCES, *ALIASES])
        raise DataError(f"{name} is neither a file, nor a folder, nor one of the data sets {known}")
    folder = root_of(root)
    files = sorted(folder.glob(source.local)) if folder else []
    return [each for file in files or [_fetch(name, source)] for each in _documents(file, source)]


def root_of(root: Path | None) -> Path | None:
    """The folder that data is looked up in by name: the one given, else the one in the environment."""
    told = root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    return told and told.expanduser()


def _documents(file: Path, source: Source) -> Iterator[Document]:
    if source.repo == "Salesforce/wikitext":
        text = "".join(row["text"] for row in _rows(file)) if file.suffix == ".parquet" else None
        yield from articles(decode(file.read_bytes(), file) if text is None else text, file.name)
    elif source.make is document:
        yield from read(file)
    else:
        rows = (
            enumerate(_rows(file), 1) if file.suffix == ".parquet" else records(decode(file.read_bytes(), file), file)
        )
        for line, row in rows:
            try:
                made = source.make(row, f"{file.name}:{line}")
            except (KeyError, IndexError, TypeError) as error:
                raise DataError(f"{file}, line {line}: {error} is not as in {source.repo}") from error
            if made is not None:
                yield made


def articles(text: str, name: str) -> Iterator[Document]:
    """WikiText's articles, each from its heading ` = Title = ` to the next one's."""
    starts = [match.start() for match in re.finditer(r"^ = [^=\n].*[^=\n] = *$", text, re.MULTILINE)]
    for number, (start, end) in enumerate(zip([0, *starts], [*starts, len(text)], strict=True)):
        if text[start:end].strip():
            yield Document(f"{name}#{number}", text=text[start:end])


def _rows(file: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f"{file.name} is parquet; `pip install promptstitch[lab]` brings what reads it") from error
    try:
        yield from parquet.read_table(file).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{file} is no whole parquet file ({error}); fetch it again") from error


def _fetch(name: str, source: Source) -> Path:
    try:
        return Path(hf_hub_download(source.repo, source.file, repo_type="dataset", revision=source.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} is not at hand and the Hub did not give {source.repo} ({why}); put {source.local} into a folder "
            f"and name the folder: --data-root, {ROOT_VARIABLE}"
        ) from error
