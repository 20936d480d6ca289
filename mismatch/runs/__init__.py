"""The run folder and its content: table, state, environment, ranks."""
