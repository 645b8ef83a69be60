"""Adapters to other libraries; each module needs its library and nothing else does."""
