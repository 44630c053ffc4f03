"""One adapter per framework: the only places that import them."""
