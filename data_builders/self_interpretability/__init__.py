"""Data for self-interpretability: choice contexts, hidden weights, decisions and reports."""
