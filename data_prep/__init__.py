"""Training data: parametric people of MakeHuman (CC0) heads, PanoHead's, scans; captures to evaluate on.

Every command has `--help`; docs/data_factory.md describes all of them.
"""
