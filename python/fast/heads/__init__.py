"""Heads: find a classifier's last layer, replace it, normalise what it sees, fold it back."""

from fast.heads.adapters import (
    adapter_state,
    adapters,
    add_adapters,
    attach_adapters,
    drop_adapters,
    merge_adapters,
)
from fast.heads.batch_norm import (
    by_batch_statistics,
    estimate_statistics,
    has_batch_norm,
    has_layer_norm,
    load_source_norms,
    norm_momenta,
    plain_batch_norm,
    running_statistics,
    set_batch_norm,
    source_norms,
)
from fast.heads.feature_norm import FeatureNorm
from fast.heads.find import Head, classes_of, find_head, own_parameters, places_of
from fast.heads.forward import evaluating, forward_logits, in_mode, traceless, unwrap
from fast.heads.replace import (
    TaskHead,
    calibrate,
    calibrate_from,
    features_of,
    fold_head,
    replace_head,
    task_head,
)
from fast.heads.rows import by_sample, check_rows
from fast.heads.task import source_task

__all__ = [
    "FeatureNorm",
    "Head",
    "TaskHead",
    "adapter_state",
    "adapters",
    "add_adapters",
    "attach_adapters",
    "by_batch_statistics",
    "by_sample",
    "calibrate",
    "calibrate_from",
    "check_rows",
    "classes_of",
    "drop_adapters",
    "estimate_statistics",
    "evaluating",
    "features_of",
    "find_head",
    "fold_head",
    "forward_logits",
    "has_batch_norm",
    "has_layer_norm",
    "in_mode",
    "load_source_norms",
    "merge_adapters",
    "norm_momenta",
    "own_parameters",
    "places_of",
    "plain_batch_norm",
    "replace_head",
    "running_statistics",
    "set_batch_norm",
    "source_norms",
    "source_task",
    "task_head",
    "traceless",
    "unwrap",
]
