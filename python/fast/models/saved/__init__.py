"""The folder of a run: the names of its files, whose it is, and the networks that it holds."""

from fast.models.saved.claim import is_going_on
from fast.models.saved.files import (
    ADAPTERS_FILE,
    CONFIG_FILE,
    DATA_FILE,
    FILES,
    HISTORY_FILE,
    JOIN_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIONS_FILE,
    RESULT_FILE,
    SOURCE_HEAD_FILE,
    SOURCE_NORMS_FILE,
    check_manifest,
    is_library_config,
    list_checkpoints,
    options_file,
    read_options,
    write_manifest,
)
from fast.models.saved.networks import SavedNetworks, load_saved, save_networks

__all__ = [
    "ADAPTERS_FILE",
    "CONFIG_FILE",
    "DATA_FILE",
    "FILES",
    "HISTORY_FILE",
    "JOIN_FILE",
    "MANIFEST_FILE",
    "MODEL_FILE",
    "OPTIONS_FILE",
    "RESULT_FILE",
    "SOURCE_HEAD_FILE",
    "SOURCE_NORMS_FILE",
    "SavedNetworks",
    "check_manifest",
    "is_going_on",
    "is_library_config",
    "list_checkpoints",
    "load_saved",
    "options_file",
    "read_options",
    "save_networks",
    "write_manifest",
]
