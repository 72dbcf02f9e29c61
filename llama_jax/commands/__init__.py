"""One file a command: its flags, a call of the library, and how the answer is shown.

Every module here has `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args) -> report`;
`show(report, args)` prints the report for a person, and `--json` prints it as it is. Nothing
heavy is imported before `run`, so that `--help` answers at once.
"""
