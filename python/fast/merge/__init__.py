"""What becomes of networks after an adaptation: joined, or taken back to a budget."""
