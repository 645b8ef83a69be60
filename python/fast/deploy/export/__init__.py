"""Write a network for use without this library."""
