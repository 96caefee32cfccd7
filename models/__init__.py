"""Small trained models that ship with the package, and adapters for the libraries that models come from."""
