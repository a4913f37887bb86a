"""Data builders: one folder a method, plus what several rows share (`rows.py`). Never imports torch."""
