"""The coordinator, its state, evaluation, reports and the command line."""
