"""The methods: PEFT tuners, TRL trainers, search. Names load when first used: importing this package is quick."""

from importlib import import_module

_MODULES = {
    "AgentSFTConfig": "ping.trainer",
    "AgentSFTTrainer": "ping.trainer",
    "AtlasConfig": "atlas.trainer",
    "AtlasTrainer": "atlas.trainer",
    "Composer": "atlas",
    "HeadSelection": "lofit",
    "HintingConfig": "task_hinting.trainer",
    "HintingTrainer": "task_hinting.trainer",
    "LofitConfig": "lofit",
    "LofitDPOConfig": "lofit",
    "LofitDPOTrainer": "lofit",
    "LofitSFTConfig": "lofit",
    "LofitSFTTrainer": "lofit",
    "LowRankComposer": "atlas.low_rank",
    "Prefix": "ping",
    "PrefixGuard": "ping",
    "PrefixSearch": "ping",
    "ServerGuard": "ping",
    "PreferenceConfig": "self_interpretability.trainer",
    "PreferenceTrainer": "self_interpretability.trainer",
    "ReportConfig": "self_interpretability.trainer",
    "ReportTrainer": "self_interpretability.trainer",
    "TaskVector": "atlas",
    "export_merged": "lofit",
    "newest_complete_checkpoint": "checkpoints",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
