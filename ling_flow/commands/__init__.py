"""The commands of `lingflow`, a file for each of its neighbours. Nothing heavy is imported before a command runs."""
