"""PING: prefixes for agents, and the search for them (arXiv 2508.14031)."""

from ...endpoint import Endpoint
from .generators import EndpointGenerator, GrammarGenerator, ModelGenerator
from .prefix import Prefix, PrefixGuard
from .search import PrefixSearch, Scored, SearchError, Seeds
from .server import NotContinued, ServerGuard

__all__ = [
    "Endpoint",
    "EndpointGenerator",
    "GrammarGenerator",
    "ModelGenerator",
    "NotContinued",
    "Prefix",
    "PrefixGuard",
    "PrefixSearch",
    "Scored",
    "SearchError",
    "Seeds",
    "ServerGuard",
]
