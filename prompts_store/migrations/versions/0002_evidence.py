"""A version's golden self-test, and the gain that a measurement shows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("versions", sa.Column("golden", sa.Text(), nullable=True))
    for name in ("gain", "gain_low", "gain_high"):
        op.add_column("measurements", sa.Column(name, sa.Double(), nullable=True))
