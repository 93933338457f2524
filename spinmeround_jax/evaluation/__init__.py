"""Evaluation of views: protocols, measures, caches of their results, and the report."""
