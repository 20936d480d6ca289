"""The run folder and what lies in it: table, state, environment, ranks."""
