"""The subcommands of ``medvl``, a module each. Importing them costs click and nothing more; what is heavy is imported as a command runs."""
