"""Documents from files: plain text, or JSON lines with `text`, `prompt` and `completion`, or chat `messages`.

A document is the unit of everything that follows: windows lie inside one, splits deal out whole ones, intervals
resample them. Knows files; knows no tokenizer and no data set by name (`lab.data.named` does).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".raw"})


Make = Callable[[Mapping[str, Any], str], "Document"]  # of a record, and where it stands


class DataError(ValueError):
    """Data that cannot be used. The message names the file and the place, and says what to do."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat; `role` as the model's chat template names it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One of three: a `text`; a `text` that is asked and the `completion` that answers it; the `turns` of a chat.

    `domain` is what must not fall into two splits: the site of its `url`, else its `content`.
    """

    id: str
    domain: str = ""
    text: str | None = None
    completion: str | None = None
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if not self.domain:
            object.__setattr__(self, "domain", self.content)

    @property
    def words(self) -> str:
        """Its text, for looking for overlaps; what the system says to many chats alike is left out."""
        turns = (turn.content for turn in self.turns if turn.role != "system")
        return "\n".join(part for part in (self.text or "", self.completion or "", *turns) if part)

    @property
    def content(self) -> str:
        """A name that documents of the same words share."""
        return f"words:{hashlib.sha256(' '.join(normalised(self.words)).encode()).hexdigest()[:32]}"


def form(documents: Sequence[Document]) -> str:
    """`text`, `completion` or `chat` where all are that, else `mixed`."""
    found = {"chat" if each.turns else "text" if each.completion is None else "completion" for each in documents}
    return found.pop() if len(found) == 1 else "mixed"


def normalised(text: str) -> list[str]:
    """Its words, whatever their case and what stands between them."""
    return re.findall(r"\w+", text.lower())


def read(path: Path, make: Make | None = None) -> list[Document]:
    """The documents of a file, or of all files of a folder in the order of their names.

    A `.txt` is one document; `.jsonl` holds one a line, gzipped or not, of which `make` (None: `document`) makes one.
    Raises DataError.
    """
    make = make or document
    if path.is_dir():
        known = JSON_SUFFIXES | TEXT_SUFFIXES
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in known)
        if not files:
            raise DataError(f"{path} holds no data; it takes files ending in {', '.join(sorted(known))}")
        return [each for file in files for each in read(file, make)]
    if not path.is_file():
        raise DataError(f"there is no {path}")
    text = decode(_bytes(path), path)
    if _suffix(path) in JSON_SUFFIXES:
        documents = [make(record, f"{path.name}:{line}") for line, record in records(text, path)]
    else:
        documents = [Document(path.name, text=text)]
    if not any(each.words.strip() for each in documents):
        raise DataError(f"{path} is empty; give it at least one text")
    return documents


def decode(data: bytes, path: Path) -> str:
    """UTF-8, a byte order mark left out. Raises DataError with the offset of the first byte that is not."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert it, for example with iconv"
        ) from error


def records(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number of the line from 1, object) of JSON lines, blank ones passed over. Raises DataError."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number} is not JSON ({error}); each line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} is {type(record).__name__}; each line must be one JSON object")
        yield number, record


def question(record: Mapping[str, Any], where: str) -> Document:
    """As `document`, where no answer is needed. Raises DataError."""
    if "messages" in record:
        return Document(str(record.get("id", where)), turns=_turns(record["messages"], where, answered=False))
    if "prompt" in record:
        return Document(str(record.get("id", where)), text=_text(record, "prompt", where))
    return document(record, where)


def document(record: Mapping[str, Any], where: str) -> Document:
    """One record of a file. `where` names it in errors, and in its id if it has none. Raises DataError."""
    url = record.get("url")
    name = str(record.get("id", where))
    domain = site(url) if isinstance(url, str) and url else ""
    if "messages" in record:
        return Document(name, domain, turns=_turns(record["messages"], where))
    if "prompt" in record or "completion" in record:
        return Document(name, domain, _text(record, "prompt", where), _text(record, "completion", where))
    if "text" in record:
        return Document(name, domain, _text(record, "text", where))
    had = ", ".join(sorted(map(str, record))) or "none"
    raise DataError(f"{where} has none of the fields text, prompt and completion, messages; its fields: {had}")


def site(url: str) -> str:
    """The last two labels of the host, `https://www.example.com/x` → `example.com`; without a host, the address."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname
    except ValueError:
        host = None
    return ".".join(host.rstrip(".").split(".")[-2:]) if host else url


def digest(documents: Sequence[Document]) -> str:
    """`sha256:<hex>` of the documents' contents in order; their names and places are no part of it."""
    hashed = hashlib.sha256()
    for each in documents:
        content = [each.text, each.completion, [[turn.role, turn.content] for turn in each.turns]]
        hashed.update(json.dumps(content).encode() + b"\n")
    return f"sha256:{hashed.hexdigest()}"


def _turns(messages: Any, where: str, answered: bool = True) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one object with role and content")
    turns = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: messages[{at}] must be an object with role and content")
        turns.append(Turn(_text(message, "role", where), _text(message, "content", where)))
    if answered and not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: messages hold no turn of the assistant, and only those are learned and scored")
    return tuple(turns)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        what = "is missing" if field not in record else f"is {type(value).__name__}, not a text"
        raise DataError(f"{where}: {field} {what}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {field} holds half a character (\\u{ord(value[error.start]):04x}) at {error.start}; "
            "write both halves or none"
        ) from error
    return value


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
