"""PING: prefixes for agents, and the search for them (arXiv 2508.14031)."""

from .prefix import Prefix, PrefixGuard

__all__ = ["Prefix", "PrefixGuard"]
