"""A whole process that serves a fake engine: `python serve_fake.py STORE [name=value …]`.

`load=SECONDS` and `step=SECONDS` slow it, `broken=1` lets the model fail to load; everything else is a setting. Prints
`ready URL` once it is.
"""

import sys
import time

from support.fake_engine import FakeEngine

from prompts_store.store import PromptStore
from server.run import serve
from server.settings import load_settings


def main(store: str, *options: str) -> int:
    given = dict(option.split("=", 1) for option in options)
    load, step, broken = float(given.pop("load", "0")), float(given.pop("step", "0")), given.pop("broken", None)

    def factory(settings):
        time.sleep(load)
        if broken:
            raise RuntimeError("no such checkpoint")
        return FakeEngine(step_seconds=step)

    settings = load_settings(store=store, **{"port": 0, **given})
    with PromptStore.open(store) as opened:
        return serve(settings, factory, opened, lambda info, url: print(f"ready {url}", flush=True))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
