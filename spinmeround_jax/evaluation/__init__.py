"""How views are judged: protocols, measures, what is kept of a run, and the report."""
