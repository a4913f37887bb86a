"""PING: an offline desk with tools, tasks on it, and the data that agents are trained and tested with."""
