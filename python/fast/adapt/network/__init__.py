"""The network before the first step: its head, what it computes, and the way back."""
