"""What Alembic runs: the steps, on the connection and inside the transaction that `prompts_store.database` opened."""

from __future__ import annotations

from alembic import context

from prompts_store.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
