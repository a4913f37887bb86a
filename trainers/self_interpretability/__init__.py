"""Self-interpretability: instil preferences by choices, then train the model to report them (arXiv 2505.17120)."""
