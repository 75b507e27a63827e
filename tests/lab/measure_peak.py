"""Learn a few steps in this process and print by how many bytes its anonymous memory grew at most.

Arguments: model folder, level, kind, compute, window, batch, recompute (0 or 1).
"""

import sys
import threading
import time
from pathlib import Path

import torch

from lab.data.windows import windows
from lab.evaluate.forward import own_kv
from lab.learn.compute import for_learning
from lab.learn.forms import PromptForm
from lab.learn.loop import Learner, Lesson
from lab.learn.recipe import read_recipe
from lab.run import open_run
from llama.load import load


def anonymous() -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(folder: str, level: str, kind: str, compute: str, window: int, batch: int, recompute: bool) -> None:
    changes = {"window": window, "batch": batch, "recompute": recompute, "selections": 1, "distil": 0.0}
    recipe = read_recipe("default", kind, changes)
    ids = torch.randint(1000, (batch, window), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    lesson = Lesson(windows(ids, scored, torch.arange(batch)))
    before, most, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.003)

    threading.Thread(target=watch, daemon=True).start()
    loaded = load(Path(folder), level=level, dtype="bfloat16", device="cpu", prepare=False)
    model = for_learning(loaded.model, compute)
    del loaded
    tensors = {"prompt_embeddings": model.embed(torch.arange(recipe.positions)).float()}
    tensors = own_kv(model, tensors) if kind == "kv" else tensors
    with open_run(Path(sys.argv[8]), {}) as run:
        form = PromptForm(model, recipe.positions, recipe.recompute)
        learner = Learner(form, model.head, tensors, lesson, lesson, recipe, 2, run)
        for _ in range(2):
            learner.step()
    over.set()
    print(most[0] - before)


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7] == "1")
