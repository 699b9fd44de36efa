"""Everything that a GPU must show of hqlabel, in calls of a few minutes: see `__main__.py`."""
