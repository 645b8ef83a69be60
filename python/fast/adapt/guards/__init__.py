"""What holds the source task while the target is learned."""
