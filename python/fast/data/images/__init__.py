"""Pictures: their files, their pixels, and how a network wants them."""
