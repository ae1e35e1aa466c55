"""Run by `database.upgrade`, which hands over an open transaction; leaves logging as it is."""

from alembic import context

from sorna_jupyter.registry.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a table in place
)
with context.begin_transaction():
    context.run_migrations()
