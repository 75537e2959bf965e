"""Which versions a task has, in a database."""
