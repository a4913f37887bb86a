"""PING: prefixes for agents, and the search for them (arXiv 2508.14031)."""

from .generators import EndpointGenerator, GrammarGenerator, ModelGenerator
from .prefix import Prefix, PrefixGuard
from .search import PrefixSearch, Scored, SearchError, Seeds

__all__ = [
    "EndpointGenerator",
    "GrammarGenerator",
    "ModelGenerator",
    "Prefix",
    "PrefixGuard",
    "PrefixSearch",
    "Scored",
    "SearchError",
    "Seeds",
]
