"""Networks made of networks that were trained before."""
