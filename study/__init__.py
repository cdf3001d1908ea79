"""A run of a script: its constants, splits, methods, records, tables and report."""
