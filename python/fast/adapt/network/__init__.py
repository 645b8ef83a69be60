"""Prepare the network for the first step: its head, its features, its shards, and the way back."""
