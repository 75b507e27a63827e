"""A LLaMA from the tensors of a checkpoint: the one place that knows them by name.

Knows what belongs where; how weights are kept is decided in `llama.build`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.build import Target, build_linear, build_q8, dense_weight
from llama.checkpoint import Checkpoint
from llama.embedding import DenseEmbedding, Embedding, Q8Embedding
from llama.errors import BrokenCheckpoint
from llama.formats.matrix import FLOATS, Format, Q8Matrix
from llama.formats.promptstitch import stored_table, table_rows
from llama.heap import trim_heap
from llama.linear import DenseLinear, Linear
from llama.model import Block, Llama, RMSNorm

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ROWS = 4096  # of a table, compared at once
NEEDLESS = ("rotary_emb.inv_freq", "lm_head.weight")  # written by some, recomputed or (if tied) repeated


@dataclass(frozen=True, slots=True)
class Assembly:
    """Builds module after module, each made ready before the next one is read. `prepare` as in `Linear.prepare`."""

    checkpoint: Checkpoint
    format: Format
    target: Target
    prepare: bool

    def model(self, done: Callable[[float], None]) -> Llama:
        """The whole model; `done` hears what share of it is there. Raises ModelError."""
        config = self.checkpoint.config
        # The head comes early: it may be rearranged by way of a copy, which then lies below the peak.
        embedding, head = self._tables()
        blocks = []
        for index in range(config.num_layers):
            done(index / config.num_layers)
            blocks.append(self._block(index))
        norm = self._norm("model.norm")
        self._refuse_leftovers()
        done(1.0)
        return Llama(config, embedding, blocks, norm, head)

    def _tables(self) -> tuple[Embedding, Linear]:
        """Embedding and head; if they are tied, over one table (V, H)."""
        table = stored_table(self.checkpoint, EMBEDDING)
        embedding: Embedding
        head: Linear
        if isinstance(table, Q8Matrix):
            shared = build_q8(EMBEDDING, table, None, self.target)
            embedding, head = Q8Embedding(shared), shared
        else:
            weight = dense_weight([table], self.target)
            apart = self.target.integers and self.checkpoint.config.tied
            embedding = DenseEmbedding(weight)
            head = build_linear(HEAD, [table], None, self.target) if apart else DenseLinear(weight)
        if not self.checkpoint.config.tied:
            on_grid = isinstance(table, Q8Matrix)
            own = stored_table(self.checkpoint, HEAD) if on_grid else self.format.matrix(HEAD, table.shape)
            head = build_linear(HEAD, [own], None, self.target)
        return embedding, self._ready(head)

    def _block(self, index: int) -> Block:
        config, at = self.checkpoint.config, f"model.layers.{index}"
        h, wide = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = {f"{at}.self_attn.q_proj": queries, f"{at}.self_attn.k_proj": keys, f"{at}.self_attn.v_proj": keys}
        return Block(
            config,
            index,
            attention_norm=self._norm(f"{at}.input_layernorm"),
            qkv=self._linear(h, qkv, config.attention_bias),
            o=self._linear(queries, {f"{at}.self_attn.o_proj": h}, config.attention_bias),
            mlp_norm=self._norm(f"{at}.post_attention_layernorm"),
            gate_up=self._linear(h, {f"{at}.mlp.gate_proj": wide, f"{at}.mlp.up_proj": wide}, config.mlp_bias),
            down=self._linear(wide, {f"{at}.mlp.down_proj": h}, config.mlp_bias),
        )

    def _linear(self, inputs: int, outputs: Mapping[str, int], biased: bool) -> Linear:
        """The layer of several modules over one input; `outputs` maps their names to their widths."""
        matrices = [self.format.matrix(module, (n, inputs)) for module, n in outputs.items()]
        bias = torch.cat([self._vector(f"{name}.bias", n) for name, n in outputs.items()]) if biased else None
        return self._ready(build_linear(" + ".join(outputs), matrices, bias, self.target))

    def _ready(self, layer: Linear) -> Linear:
        if self.prepare:
            layer.prepare()
        trim_heap()
        return layer

    def _norm(self, module: str) -> RMSNorm:
        config = self.checkpoint.config
        return RMSNorm(self._vector(f"{module}.weight", config.hidden_size), config.rms_norm_eps)

    def _vector(self, name: str, size: int) -> Tensor:
        self.checkpoint.expect(name, (size,), FLOATS)
        return self.checkpoint.tensor(name).to(self.target.place, self.target.dtype, copy=True)

    def _refuse_leftovers(self) -> None:
        """Biases of zeros are left over, too: some GPTQ writers add them to models that have none."""
        left = [name for name in self.checkpoint.unused() if not name.endswith(NEEDLESS)]
        if self.checkpoint.config.tied and f"{HEAD}.weight" in self.checkpoint.unused():
            self._check_tied()
        left = [n for n in left if not n.endswith(".bias") or bool(self.checkpoint.tensor(n).count_nonzero())]
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise BrokenCheckpoint(
                f"{self.checkpoint.directory} holds tensors that are no part of this model: {', '.join(left[:5])}{more}"
            )

    def _check_tied(self) -> None:
        """A head that is stored beside the embedding must be it: transformers serves it where it is not."""
        table, head = stored_table(self.checkpoint, EMBEDDING), self.checkpoint.tensor(f"{HEAD}.weight")
        starts = range(0, len(head), ROWS) if tuple(head.shape) == tuple(table.shape) else ()
        same = (
            torch.equal(table_rows(table, start, min(start + ROWS, len(head))), head[start : start + ROWS].float())
            for start in starts
        )
        if not starts or not all(same):
            raise BrokenCheckpoint(
                f"{self.checkpoint.directory}: config.json ties the head to the embedding, but {HEAD}.weight holds "
                "other values; set tie_word_embeddings to false to serve them"
            )
