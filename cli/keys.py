"""`promptstitch keys`: API keys of a store, or of a server by one that holds the scope admin."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Config, Key, Store, Url
from cli.output import AsJson, say, tell, tell_json, tell_list
from cli.registry import open_registry

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", help="infer, prompts:read, prompts:write or admin; more than one by repeating it."),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Scopes = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Make a key (scope infer, unless others are given). Its secret is shown this once."""
    with open_registry(url, key, store, config) as registry:
        made = registry.create_key(name, scope or ["infer"])
    tell(made, as_json)


@app.command("list")
def list_keys(
    url: Url = None, key: Key = None, store: Store = None, config: Config = None, as_json: AsJson = False
) -> None:
    """List the keys, without their secrets."""
    with open_registry(url, key, store, config) as registry:
        rows = registry.keys()
    tell_list(rows, ("id", "name", "scopes", "created_at", "revoked_at"), as_json, "no keys: loopback needs none")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key, effective at once."""
    with open_registry(url, key, store, config) as registry:
        registry.revoke_key(key_id)
    if as_json:
        tell_json({"id": key_id, "revoked": True})
    else:
        say(f"revoked {key_id}")
