"""A run of a script: its constants, splits, methods, rows, tables and report."""
