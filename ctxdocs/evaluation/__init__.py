"""How much memories keep: tasks, one way to run them, and reports."""
