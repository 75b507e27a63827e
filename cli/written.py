"""A prompt that a person wrote, as rows of the embedding table: served without any learning, equal to the text itself.

Knows a checkpoint's tokenizer and table; knows no registry.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import torch

from cli.output import CommandError
from llama.checkpoint import Checkpoint
from llama.fingerprint import EMBEDDING
from llama.formats.promptstitch import stored_table, table_rows
from llama.load import info
from llama.tokenizer import HubTokenizer
from prompts_store.file import PromptFile, Provenance
from prompts_store.prompt import Bos, SoftPrompt

MAX_TEXT_KEPT = 8192  # bytes of the text that are kept in the recipe; of a longer one, its digest


def written_prompt(text: str, folder: Path, task: str | None, level: str | None) -> PromptFile:
    """The text's rows (N, H) for the model in `folder`, at `level` or else the checkpoint's own.

    A BOS that the tokenizer puts before plain text comes first of all, before the rows of the prompt: it becomes the
    first row, and the layout says that no other follows. Raises CommandError, ModelError, InvalidArtifact.
    """
    identity = info(folder).identity
    tokenizer = HubTokenizer(folder)
    ids = tokenizer.encode(text, bos="none")
    if not ids:
        raise CommandError("TEXT has no tokens; write something", usage=True)
    bos: Bos = "tokenizer"
    if tokenizer.bos_token_id is not None and tokenizer.encode(text)[:1] == [tokenizer.bos_token_id] != ids[:1]:
        ids, bos = [tokenizer.bos_token_id, *ids], "none"
    table = stored_table(Checkpoint(folder), EMBEDDING)
    rows = torch.cat([table_rows(table, token, token + 1) for token in ids]).contiguous()
    prompt = SoftPrompt("rows", identity.base, {"prompt_embeddings": rows}, bos)
    kept = text if len(text.encode()) <= MAX_TEXT_KEPT else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    recipe = {"method": "written", "text": kept}
    return PromptFile(prompt, Provenance(task, level or identity.level, None, recipe, created))
