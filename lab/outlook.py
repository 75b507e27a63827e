"""How long each step of a recovery will take. Knows plans and the speed of this machine; carries nothing out."""

from __future__ import annotations

import torch

from lab.estimate import speeds
from lab.learn.budget import steps_of
from lab.learn.compute import choose_compute
from lab.plan import Plan
from lab.recover import PROMPT
from lab.run import FIGURES
from llama.load import choose_dtype, info

LOADING = 15.0  # seconds that a step spends on loading models, as an estimate


def estimates(plan: Plan) -> dict[str, float]:
    """Seconds of each step, in order, from the speed of products on this machine; finished steps take none."""
    order, places = plan.order, plan.places
    told = info(order.model)
    device = torch.device("cuda" if torch.cuda.is_available() and order.device != "cpu" else "cpu")
    dtype = str(choose_dtype(order.dtype, device)).removeprefix("torch.")
    speed = speeds(told.config, device, choose_compute(order.compute, device), dtype)
    found: dict[str, float] = {}
    if plan.solve:
        found["compress"] = 0.0 if places.checkpoint.exists() else LOADING + 3 * order.calibration / speed.scoring
    budget = order.budget
    tokens = budget.amount if budget.unit == "tokens" else budget.amount * order.recipe.batch * order.recipe.window
    if budget.unit == "seconds":
        tokens, seconds = budget.amount * speed.learning, budget.amount
    else:
        if plan.learning is not None:
            tokens = steps_of(budget, plan.learning.learn, order.recipe) * order.recipe.batch * order.recipe.window
        seconds = tokens / speed.learning
    taught = tokens / speed.scoring if order.recipe.distil else 0.0
    found["learn"] = 0.0 if (places.run / "learn" / PROMPT).exists() else 3 * LOADING + seconds + taught
    for split, passes in (("select", 2), ("report", 5)):
        done = (places.run / split / FIGURES).exists()
        scored = plan.materials["select" if split == "select" else "report"].sample
        found[split] = 0.0 if done else LOADING + passes * len(scored) * order.recipe.window / speed.scoring
    return found
