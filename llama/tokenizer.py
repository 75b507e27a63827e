"""Text to token ids and back, as the checkpoint's own tokenizer files say.

Knows transformers' tokenizers; knows no model, no request and no prompt beyond the place of a BOS. Loaded from local
files only, and no code from a checkpoint is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from llama.errors import BrokenCheckpoint
from llama.fingerprint import text_digest
from llama.shards import read_json

Bos = Literal["tokenizer", "none", "after_prompt"]

_WORD_START = "\u2581"  # sentencepiece's mark of a space


class HubTokenizer:
    """The tokenizer of the checkpoint in `directory`. Every method may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        """Raises BrokenCheckpoint if there is none that loads, or only one without a fast backend."""
        try:
            self._hf = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file does to its reader
            raise BrokenCheckpoint(f"{directory}: the tokenizer does not load: {error}") from error
        if not self._hf.is_fast:
            raise BrokenCheckpoint(f"{directory} lacks a tokenizer.json")
        self._eos = _eos_token_ids(directory, self._hf.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        bos: int | None = self._hf.bos_token_id
        return bos

    @property
    def eos_token_id(self) -> int | None:
        """What the tokenizer itself says ends a text."""
        eos: int | None = self._hf.eos_token_id
        return eos

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Those of the generation config and that of the tokenizer."""
        return self._eos

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return frozenset(token for token, added in self._added.items() if added.special)

    @cached_property
    def chat_template_digest(self) -> str:
        """`sha256:<hex>` of the default chat template, or "none"."""
        try:
            return text_digest(self._hf.get_chat_template())
        except ValueError:
            return "none"

    def encode(self, text: str, bos: Bos = "tokenizer") -> list[int]:
        """Ids of a plain text. `bos`: as the tokenizer does by itself, no special token, or exactly one in front.

        Raises ValueError if a BOS is asked for and the tokenizer has none.
        """
        ids: list[int] = self._hf(text, add_special_tokens=bos == "tokenizer", verbose=False)["input_ids"]
        if bos != "after_prompt":
            return ids
        if self.bos_token_id is None:
            raise ValueError("bos is after_prompt, but this model's tokenizer has no BOS token")
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of the messages through the chat template, generation prompt added; a BOS only if the template has one.

        Raises ValueError if there is no template or it refuses the messages.
        """
        return self.encode(self.chat_text(messages), bos="none")

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, asking: bool = True) -> str:
        """What the chat template makes of the messages; `asking`: with the generation prompt behind them.

        Raises ValueError if there is no template or it refuses the messages.
        """
        try:
            text: str = self._hf.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=asking, tokenize=False
            )
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out, spaces as they were."""
        text: str = self._hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, part of a character or not; none for an id beyond the vocabulary.

        Embedding tables are often padded, so a model may well choose such an id.
        """
        token = self._hf.convert_ids_to_tokens(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if token_id in self._added:
            return bytes(token, "utf-8")
        if self._byte_level:
            return bytes(self._byte_level[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return bytes(token.replace(_WORD_START, " "), "utf-8")

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        added: dict[int, AddedToken] = self._hf.added_tokens_decoder
        return added

    @cached_property
    def _byte_level(self) -> dict[str, int]:
        """Printable stand-in -> byte for a byte-level BPE; empty for a sentencepiece vocabulary."""
        decoder = json.loads(self._hf.backend_tokenizer.to_str())["decoder"] or {}
        kinds = {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ()))}
        return _byte_alphabet() if "ByteLevel" in kinds else {}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table of printable characters for the 256 bytes, which `tokenizers` builds but does not tell in order.

    Bytes that print stand for themselves; the others follow from U+0100 on, in order.
    """
    alphabet = sorted(ByteLevel.alphabet())
    own = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = (byte for byte in range(256) if byte not in own.values())
    return own | dict(zip((c for c in alphabet if c not in own), others, strict=True))


def _eos_token_ids(directory: Path, of_tokenizer: int | None) -> frozenset[int]:
    ids = {of_tokenizer}
    if (directory / "generation_config.json").exists():
        told = read_json(directory / "generation_config.json").get("eos_token_id")
        listed = told if isinstance(told, list) else [told]
        if not all(token is None or type(token) is int for token in listed):
            raise BrokenCheckpoint(f"{directory}: generation_config.json: eos_token_id is {told!r}, not ids of tokens")
        ids |= set(listed)
    return frozenset(token for token in ids if token is not None)
