"""Training data: parametric people of MakeHuman (CC0) heads, PanoHead's, scans; captures to evaluate on.

Every module with a command tells of it with `--help`; docs/data_factory.md tells of all of them.
"""
